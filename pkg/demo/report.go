package demo

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Report says what the tenants hold, and what became of the rows that do not fit.
type Report struct {
	Tenants []TenantReport
	Notes   []Note         // about the files: each row counts once, though several tenants may hold it
	Stages  map[string]int // deals of all tenants, counted in the database
	Already bool           // no tenant was filled by this Seed
	Elapsed time.Duration
}

// TenantReport is what one tenant holds, counted in the database.
type TenantReport struct {
	Tenant                     tenant.Tenant
	Accounts, Products, Agents int
	Deals                      map[string]int // by stage
}

// Note is one rule, and how many rows or values of the files it was applied to.
type Note struct {
	Count   int
	Rule    string
	LeftOut bool // the rows are in no tenant
}

// Note finds how many rows or values a rule was applied to.
func (r Report) Note(rule string) int {
	for _, n := range r.Notes {
		if n.Rule == rule {
			return n.Count
		}
	}
	return 0
}

// LeftOut counts the rows that are in no tenant.
func (r Report) LeftOut() int {
	sum := 0
	for _, n := range r.Notes {
		if n.LeftOut {
			sum += n.Count
		}
	}
	return sum
}

// Write tells the report in a few lines.
func (r Report) Write(out io.Writer) error {
	if r.Already {
		_, err := fmt.Fprintln(out, "the demo data is there already")
		return err
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	first := func(s string) string { return fmt.Sprintf("%-8s", s) } // numbers stand to the right, names to the left
	fmt.Fprintf(w, "%s\tACCOUNTS\tPRODUCTS\tAGENTS\tDEALS\t%s\t\n", first("TENANT"), strings.ToUpper(strings.Join(stages, "\t")))
	deals := func(byStage map[string]int) string {
		sum, cells := 0, make([]string, len(stages))
		for _, n := range byStage {
			sum += n
		}
		for i, s := range stages {
			cells[i] = thousands(byStage[s])
		}
		return thousands(sum) + "\t" + strings.Join(cells, "\t")
	}
	for _, t := range r.Tenants {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t\n", first(t.Tenant.Slug.String()), thousands(t.Accounts), thousands(t.Products), thousands(t.Agents), deals(t.Deals))
	}
	fmt.Fprintf(w, "%s\t\t\t\t%s\t\n", first("in all"), deals(r.Stages))
	_ = w.Flush() // a strings.Builder takes everything
	b.WriteString("\n")
	for _, n := range r.Notes {
		left := ""
		if n.LeftOut {
			left = ": left out"
		}
		fmt.Fprintf(&b, "%8s  %s%s\n", thousands(n.Count), n.Rule, left)
	}
	fmt.Fprintf(&b, "%8s  rows are in no tenant\n", thousands(r.LeftOut()))
	_, err := io.WriteString(out, b.String())
	return err
}

func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
