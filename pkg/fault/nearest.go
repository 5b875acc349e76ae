package fault

import (
	"slices"
	"strings"
)

// Nearest returns up to n candidates that a person may have meant by word, the likeliest first: for hints.
func Nearest(word string, candidates []string, n int) []string {
	type candidate struct {
		s string
		d int
	}
	var near []candidate
	for _, c := range candidates {
		d := distance(word, c)
		if d <= max(1, len(word)/3) || word != "" && strings.HasPrefix(c, word) {
			near = append(near, candidate{c, d})
		}
	}
	slices.SortStableFunc(near, func(a, b candidate) int { return a.d - b.d })
	var out []string
	for _, c := range near[:min(n, len(near))] {
		out = append(out, c.s)
	}
	return out
}

// distance is the number of single edits between two short words (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j]+1, row[j+1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
