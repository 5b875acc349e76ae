package migrate

// Split and its kin open the scanner to the tests of its text.
func Split(sql string) (texts []string, lines []int, blank []bool, openLine int) {
	all, open := split(sql)
	for _, s := range all {
		texts, lines, blank = append(texts, s.text), append(lines, s.line), append(blank, s.blank)
	}
	return texts, lines, blank, open
}

func ControlIn(sql string) bool {
	_, _, found := controlIn(sql)
	return found
}

func Plain(sql string) string { return plainText(sql) }

// Rows and batches that every data migration may change.
const FreeBatches = freeBatches
