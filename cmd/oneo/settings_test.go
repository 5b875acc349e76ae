package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// What an editor leaves is stored, unless it is wrong or somebody else came first: then nothing is stored and nothing that was typed is lost.
func TestSettingsInAnEditor(t *testing.T) {
	t.Parallel()
	c := newCommand(t)
	c.run(0, "tenant create acme")
	admin := pgtest.Admin(t, c.env.AdminURL)
	edit := func(script string) (string, error) {
		editor := filepath.Join(t.TempDir(), "editor")
		require.NoError(t, os.WriteFile(editor, []byte("#!/bin/sh\n"+script), 0o755))
		var told bytes.Buffer
		e := &env{in: strings.NewReader(""), out: io.Discard, err: &told, terminal: true, environ: append(slices.Clone(c.environ), "EDITOR="+editor+" --wait"), flags: map[string]string{}}
		defer func() { require.NoError(t, e.app.Close()) }()
		err := tenantEdit(t.Context(), e, "acme", "")
		return told.String(), err
	}
	settings := func() (s string) {
		require.NoError(t, admin.QueryRow(t.Context(), `select settings::text from public.tenants`).Scan(&s))
		return s
	}
	_, err := edit(`[ "$1" = --wait ] && printf '{"a": 1}' >"$2"`)
	require.NoError(t, err)
	require.JSONEq(t, `{"a": 1}`, settings())
	told, err := edit(`true`)
	require.NoError(t, err)
	require.Contains(t, told, "as they were")

	kept := func(told string) string {
		m := regexp.MustCompile(`your text is in (\S+)`).FindStringSubmatch(told)
		require.Len(t, m, 2, told)
		text, err := os.ReadFile(m[1])
		require.NoError(t, err)
		info, err := os.Stat(m[1])
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
		require.NoError(t, os.Remove(m[1]))
		return string(text)
	}
	told, err = edit(`printf '{"a": 2' >"$2"`)
	require.True(t, fault.Is(err, fault.Unfit), "%v", err)
	require.Equal(t, `{"a": 2`, kept(told))
	require.JSONEq(t, `{"a": 1}`, settings())

	told, err = edit(fmt.Sprintf(`printf '{"a": 3}' >"$2"; psql -qX '%s' -c "update public.tenants set settings = '{\"b\": 1}'"`, c.env.AdminURL))
	require.Equal(t, "settings_changed", fault.Of(err).StableCode(), "%v", err)
	require.Equal(t, `{"a": 3}`, kept(told))
	require.JSONEq(t, `{"b": 1}`, settings())

	_, err = edit(`printf '{"a": 4}' >"$2"; exit 1`)
	require.Equal(t, "editor", fault.Of(err).StableCode(), "%v", err)
	require.JSONEq(t, `{"b": 1}`, settings())
	var audited int
	require.NoError(t, admin.QueryRow(t.Context(), `select count(*) from public.audit where action = 'settings.change'`).Scan(&audited))
	require.Equal(t, 1, audited)
}
