package pkg_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestDecisionsAreHeld finds the tests that each decision record ends with: a record that nothing holds is a wish.
func TestDecisionsAreHeld(t *testing.T) {
	t.Parallel()
	funcs := map[string]bool{}
	var files []string
	for _, pattern := range []string{"*_test.go", "*/*_test.go", "../cmd/oneo/*_test.go"} {
		found, err := filepath.Glob(pattern)
		require.NoError(t, err)
		files = append(files, found...)
	}
	for _, file := range files {
		src, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllSubmatch(src, -1) {
			funcs[string(m[1])] = true
		}
	}
	records, err := filepath.Glob("../docs/adr/*.md")
	require.NoError(t, err)
	require.NotEmpty(t, records)
	for _, record := range records {
		text, err := os.ReadFile(record)
		require.NoError(t, err)
		paragraphs := strings.Split(strings.TrimSpace(string(text)), "\n\n")
		last := paragraphs[len(paragraphs)-1]
		require.True(t, strings.HasPrefix(last, "Held by "), "%s does not end with what holds it", record)
		names := regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(last, -1)
		require.NotEmpty(t, names, record)
		for _, n := range names {
			require.True(t, funcs[n[1]], "%s is held by %s, which does not exist", record, n[1])
		}
	}
}
