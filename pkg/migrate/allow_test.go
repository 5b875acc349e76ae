package migrate_test

import (
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/migrate"
)

// What a file allows the linter may stand above any statement; the engine's own directives may not.
func TestWhatTheLinterIsToldIsNoDirective(t *testing.T) {
	t.Parallel()
	load := func(up string) ([]migrate.File, error) {
		return migrate.Load(fstest.MapFS{
			"0001_a.up.sql": {Data: []byte(up)}, "0001_a.down.sql": {Data: []byte("-- oneo: allow cascade x\ndrop table a cascade;\n-- oneo: allow cascade x\ndrop table b cascade;")},
		}, ".")
	}
	const allow = "-- oneo: allow create-index it is small\n"
	files, err := load(allow + "--oneo:allow\n-- oneo: breaking\n" + allow + "create table a (id int);\n" + allow + "create table b (id int);\n")
	require.NoError(t, err)
	require.True(t, files[0].Breaking)
	_, err = load(allow + "create table a (id int);\n-- oneo: allowed x\ncreate table b (id int);\n")
	require.ErrorContains(t, err, "line 3: a directive stands below the first statement")
	_, err = load("-- oneo: allowed\ncreate table a (id int);\n")
	require.ErrorContains(t, err, `there is no directive "allowed"`)
}
