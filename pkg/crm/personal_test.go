package crm_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/crm"
)

// What a field holds of a person is what its options say, and else what its key sounds like; only a text holds anything.
func TestPersonal(t *testing.T) {
	t.Parallel()
	for key, want := range map[string]string{
		"email": "email", "work_email": "email", "email_address": "email", "phone": "phone", "mobile_2": "phone", "name": "name",
		"last_name": "name", "surname": "name", "street": "address", "billing_address": "address", "zip": "address",
		"notes": "none", "mailing": "none", "renamed": "none", "telemetry": "none", "code": "none",
	} {
		require.Equal(t, want, crm.Field{Key: key, Type: crm.Text}.Personal(), key)
		require.Equal(t, "none", crm.Field{Key: key, Type: crm.Select}.Personal(), key)
		require.Equal(t, "text", crm.Field{Key: key, Type: crm.Text, Options: crm.Options{Personal: "text"}}.Personal(), key)
		require.Equal(t, "none", crm.Field{Key: key, Type: crm.Text, Options: crm.Options{Personal: "none"}}.Personal(), key)
	}
}
