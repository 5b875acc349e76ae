package lint_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/lint"
)

// What is nested deeper than the parser's stack, or than the reader of its answer goes, is a finding, and the next file is
// read as ever.
func TestWhatIsNestedTooDeeply(t *testing.T) {
	t.Parallel()
	for name, sql := range map[string]string{
		"brackets": "select " + strings.Repeat("(", 200_000) + "1" + strings.Repeat(")", 200_000),
		"sums":     "select " + strings.Repeat("1+(", 20_000) + "1" + strings.Repeat(")", 20_000),
		"queries":  strings.Repeat("select (", 20_000) + "1" + strings.Repeat(")", 20_000),
		"blocks":   "do $$ " + strings.Repeat("begin ", 20_000) + "null;" + strings.Repeat("end;", 20_000) + "$$",
	} {
		got := lint.Check(lint.Tenant, nil, []lint.File{
			{Name: "deep", Kind: lint.Transactional, SQL: sql, HasDown: true},
			{Name: "next", Kind: lint.Transactional, SQL: "create schema x; do $$ begin execute 'x'; end $$", HasDown: true},
		})
		require.Contains(t, []string{"syntax", "unseen-sql"}, got[0].Rule, name)
		require.Equal(t, "deep", got[0].File)
		require.Equal(t, []string{"schema", "unseen-sql"}, rulesOf(got[1:]), name)
	}
}

// What the parser never ends with, or breaks by, is a finding too. In a process of its own, whose parser is then broken.
func TestWhatTheParserDoesNotSurvive(t *testing.T) {
	t.Parallel()
	const child = "ONEO_TEST_BREAK_THE_PARSER"
	if os.Getenv(child) == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestWhatTheParserDoesNotSurvive$", "-test.v")
		cmd.Env = append(os.Environ(), child+"=1")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "read again")
		return
	}
	next := lint.File{Name: "next", Kind: lint.Transactional, SQL: "create schema x", HasDown: true}
	got := lint.Check(lint.Tenant, nil, []lint.File{{Name: "endless", Kind: lint.Transactional, SQL: "select 1" + strings.Repeat("+1", 1000), HasDown: true}, next})
	require.Equal(t, []string{"syntax", "schema"}, rulesOf(got), "%v", got)
	t.Log("read again")
	got = lint.Check(lint.Tenant, nil, []lint.File{{Name: "broken", Kind: lint.Transactional, SQL: "select 1" + strings.Repeat(" union select 1", 4000), HasDown: true}, next})
	require.Equal(t, "syntax", got[0].Rule)
	require.Equal(t, lint.Error, got[0].Severity)
	require.NotEmpty(t, got[1:], "the next file is either read, or said to be unread")
}
