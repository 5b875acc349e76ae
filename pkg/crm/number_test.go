package crm_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/fault"
)

func TestCheckNumbers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ raw, code string }{
		{`{"a": [1, -2.50, 1e999, 1E-999, 0e0, 1e+0007, "1e131000"]}`, ""},
		{`[` + strings.Repeat("9", 100) + `]`, ""},
		{`[` + strings.Repeat("1e999,", 65) + `1]`, ""},
		{`1e1000`, "number"},
		{`{"a": [{"b": 1e131000}]}`, "number"},
		{`[1E-131000]`, "number"},
		{`[1e+0001000]`, "number"},
		{`[1e99999999999999999999]`, "number"},
		{`[` + strings.Repeat("9", 101) + `]`, "number"},
		{`[` + strings.Repeat("1e999,", 66) + `1]`, "number"},
		{`{"a": `, ""}, // how it is written is another's to check
		{`{"a": nonsense}`, "malformed_json"},
	} {
		err := crm.CheckNumbers(json.RawMessage(c.raw))
		if c.code == "" {
			require.NoError(t, err, "%.100s", c.raw)
			continue
		}
		require.Error(t, err, "%.100s", c.raw)
		require.Equal(t, c.code, fault.Of(err).Code, "%.100s", c.raw)
	}
}
