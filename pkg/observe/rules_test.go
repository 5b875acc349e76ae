package observe_test

import (
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"

	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// alerts are the rules of config/alerts.yaml: their expressions by name.
func alerts(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("../../config/alerts.yaml")
	require.NoError(t, err)
	var file struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	require.NoError(t, yaml.Unmarshal(text, &file))
	out := map[string]string{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			out[r.Alert] = r.Expr
		}
	}
	require.NotEmpty(t, out)
	return out
}

// queries are those of config/grafana.json, by the titles of their panels.
func queries(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("../../config/grafana.json")
	require.NoError(t, err)
	var board struct {
		Templating struct {
			List []struct{ Name, Definition string }
		}
		Panels []struct {
			Title, Type string
			Targets     []struct{ Expr string }
		}
	}
	require.NoError(t, json.Unmarshal(text, &board))
	out := map[string][]string{}
	for _, p := range board.Panels {
		for _, q := range p.Targets {
			out[p.Title] = append(out[p.Title], strings.ReplaceAll(q.Expr, "$__rate_interval", "5m"))
		}
		require.True(t, p.Type == "row" || len(out[p.Title]) > 0, "the panel %s asks nothing", p.Title)
	}
	for _, v := range board.Templating.List {
		if m := regexp.MustCompile(`^label_values\((\w+), instance\)$`).FindStringSubmatch(v.Definition); m != nil {
			out["variable "+v.Name] = []string{m[1]}
		}
	}
	require.Greater(t, len(out), 20)
	return out
}

var (
	matchers = regexp.MustCompile(`(\w+)\{([^}]*)\}`)
	matcher  = regexp.MustCompile(`(\w+)\s*[!=]=?~?\s*"`)
	grouping = regexp.MustCompile(`\b(by|without|on|ignoring)\s*\(([^)]*)\)`)
	within   = regexp.MustCompile(`\[[^\]]*\]`)
	word     = regexp.MustCompile(`[A-Za-z_:][\w:]*(\s*\()?`)
	text     = regexp.MustCompile(`"[^"]*"`)
)

// metricsOf are the metrics that an expression names.
func metricsOf(expr string) (names []string) {
	expr = matchers.ReplaceAllString(expr, "$1")
	expr = within.ReplaceAllString(grouping.ReplaceAllString(expr, ""), "")
	for _, w := range word.FindAllString(text.ReplaceAllString(expr, ""), -1) {
		if !strings.HasSuffix(w, "(") && !slices.Contains([]string{"and", "or", "unless", "bool", "offset"}, w) {
			names = append(names, w)
		}
	}
	return names
}

// A rule or panel that names a metric or a label that is not there is silent for ever.
func TestAlertsAndDashboardNameOnlyMetricsThatThereAre(t *testing.T) {
	there := observe.Names()
	runtime := observe.New(observe.Options{
		Counter: observe.NewCounter(0), Cache: openCache(t, ""), Pools: func() []postgres.Stats { return nil }, Logger: slog.New(slog.DiscardHandler),
	})
	for sample := range scrape(t, runtime) {
		there[nameOf(sample)] = true
	}
	there["up"] = true // Prometheus' own
	labels := observe.Labels()
	check := func(where, expr string) {
		t.Helper()
		names := metricsOf(expr)
		require.NotEmpty(t, names, "%s: %s", where, expr)
		allowed := []string{"instance", "job"} // Prometheus' own
		for _, name := range names {
			require.True(t, there[name], "%s names %s, which /metrics does not have", where, name)
			base := name
			for _, part := range []string{"_bucket", "_sum", "_count"} {
				if whole, cut := strings.CutSuffix(name, part); cut && labels[whole] != nil {
					base, allowed = whole, append(allowed, "le")
				}
			}
			allowed = append(allowed, labels[base]...)
		}
		for _, m := range matchers.FindAllStringSubmatch(expr, -1) {
			for _, l := range matcher.FindAllStringSubmatch(m[2], -1) {
				require.Contains(t, allowed, l[1], "%s: %s", where, expr)
			}
		}
		for _, g := range grouping.FindAllStringSubmatch(expr, -1) {
			for l := range strings.SplitSeq(g[2], ",") {
				require.Contains(t, allowed, strings.TrimSpace(l), "%s: %s", where, expr)
			}
		}
	}
	for name, expr := range alerts(t) {
		check(name, expr)
	}
	for panel, exprs := range queries(t) {
		for _, expr := range exprs {
			check(panel, expr)
		}
	}
	require.Equal(t, []string{"oneo_pol_waits_total", "oneo_runs"}, metricsOf(`sum by (group) (rate(oneo_pol_waits_total{group="main"}[5m])) > bool max(oneo_runs)`))
}

// Each rule is raised by what it is for, and by nothing of a fleet that is well.
func TestAlertRules(t *testing.T) {
	t.Parallel()
	promtool, err := exec.LookPath("promtool")
	require.NoError(t, err, "scripts/setup.sh --ci brings promtool")
	out, err := exec.CommandContext(t.Context(), promtool, "test", "rules", "../../config/alerts_test.yaml").CombinedOutput()
	require.NoError(t, err, "%s", out)
	tests, err := os.ReadFile("../../config/alerts_test.yaml")
	require.NoError(t, err)
	for name := range alerts(t) {
		raised := `count(ALERTS{alertname="` + name + `", alertstate="firing"})', eval_time: `
		require.Regexp(t, regexp.QuoteMeta(raised)+`\w+, exp_samples: \[\{labels: '\{\}', value: 1\}\]`, string(tests), "no test raises %s", name)
	}
	// The dashboard's queries are PromQL: as rules, they can be read.
	type rule struct {
		Record string `yaml:"record"`
		Expr   string `yaml:"expr"`
	}
	var rules []rule
	for _, exprs := range queries(t) {
		for _, expr := range exprs {
			rules = append(rules, rule{"panel:query:rate", expr})
		}
	}
	file, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "panels", "rules": rules}}})
	require.NoError(t, err)
	path := t.TempDir() + "/panels.yaml"
	require.NoError(t, os.WriteFile(path, file, 0o600))
	out, err = exec.CommandContext(t.Context(), promtool, "check", "rules", "--lint=none", path).CombinedOutput()
	require.NoError(t, err, "%s", out)
}
