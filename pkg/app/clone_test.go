package app_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// everything is all that a schema holds, as text: every column of every table.
func everything(t *testing.T, admin *pgx.Conn, schema string) string {
	t.Helper()
	rows, err := admin.Query(t.Context(), `select format('select coalesce(string_agg(x::text, chr(10)), '''') from %I.%I x', n.nspname, c.relname)
from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = $1 and c.relkind in ('r', 'p', 'm')`, schema)
	require.NoError(t, err)
	asks, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	require.NotEmpty(t, asks)
	var all strings.Builder
	for _, ask := range asks {
		var text string
		require.NoError(t, admin.QueryRow(t.Context(), ask).Scan(&text))
		all.WriteString(text + "\n")
	}
	return all.String()
}

func clone(t *testing.T, a *app.App, from tenant.Tenant, as string, masked bool) transfer.Cloned {
	t.Helper()
	done, err := a.Transfers.Clone(t.Context(), from, transfer.CloneOptions{Slug: pgtest.Slug(t, as), Mask: masked, Actor: "test"})
	require.NoError(t, err)
	return done
}

// What opens a tenant opens no clone of it: neither its API keys nor its sessions.
func TestKeysDoNotOpenClones(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	a := open(t, env, "")
	ctx := t.Context()
	token := session(t, env, acme)
	var key string
	require.NoError(t, env.DB.InTenant(ctx, acme, postgres.Write, func(tx *postgres.Tx) error {
		all, err := auth.Tenants().Users(ctx, tx, 1, nil)
		if err != nil {
			return err
		}
		_, key, err = auth.Tenants().AddKey(ctx, tx, all[0].ID, "ci", nil, nil)
		return err
	}))
	copied := clone(t, a, acme, "copy", false).Tenant
	addr := serve(t, a)
	for _, secret := range []string{key, token} {
		status, _ := ask(t, addr, "GET", "acme.localhost", "/api/v1/pipelines", secret, "")
		require.Equal(t, http.StatusOK, status)
		status, _ = ask(t, addr, "GET", "copy.localhost", "/api/v1/pipelines", secret, "")
		require.Equal(t, http.StatusUnauthorized, status)
	}
	var left int
	admin := pgtest.Admin(t, env.AdminURL)
	require.NoError(t, admin.QueryRow(ctx, fmt.Sprintf("select (select count(*) from %[1]s.api_keys) + (select count(*) from %[1]s.sessions)", copied.Schema)).Scan(&left))
	require.Zero(t, left)
	require.NoError(t, admin.QueryRow(ctx, `select count(*) from acme.api_keys`).Scan(&left))
	require.Equal(t, 1, left, "the original keeps its own")
}

// Nothing of what is about people comes into a masked clone, of whatever field; what is not about people does, and what
// refers to each other goes on doing so.
func TestMaskedClone(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	a := open(t, env, "")
	ctx := context.Background()
	secrets := []string{"Ada", "Lovelace", "ada@acme.example", "acme.example", "7654321", "St James", "SW1Y", "DE89", "argon2id"}
	var account uuid.UUID
	require.NoError(t, env.DB.InTenant(ctx, acme, postgres.Write, func(tx *postgres.Tx) error {
		hash, err := a.Hasher.Hash(ctx, "correct horse battery staple")
		if err != nil {
			return err
		}
		u, err := auth.Tenants().AddUser(ctx, tx, auth.NewUser{Email: "ada@acme.example", Name: "Ada Lovelace", Role: auth.RoleAdmin, PasswordHash: hash})
		if err != nil {
			return err
		}
		if _, _, err := auth.Tenants().AddKey(ctx, tx, u.ID, "Ada's key", nil, nil); err != nil {
			return err
		}
		_, err = crm.CreatePipeline(ctx, tx, crm.NewPipeline{Key: "contacts", Fields: []crm.NewField{
			{Key: "name", Type: crm.Text, Required: true}, {Key: "work_email", Type: crm.Text}, {Key: "mobile", Type: crm.Text}, {Key: "street", Type: crm.Text},
			{Key: "iban", Type: crm.Text, Options: crm.Options{Personal: crm.PersonalText}},
			{Key: "product_name", Type: crm.Text, Options: crm.Options{Personal: crm.NotPersonal}},
			{Key: "notes", Type: crm.Text}, {Key: "revenue", Type: crm.Number}, {Key: "boss", Type: crm.Relation, Options: crm.Options{Pipeline: "contacts"}},
		}})
		if err != nil {
			return err
		}
		made, err := crm.CreateRecords(ctx, tx, "contacts", []json.RawMessage{
			json.RawMessage(`{"name": "Ada Lovelace", "work_email": "ada@acme.example", "mobile": "+44 20 7654321", "street": "12 St James's Square\n\"SW1Y\" \\ 4JH", "iban": "DE89",
"product_name": "Engine", "notes": "free text", "revenue": 12345678901234567890.10}`),
			json.RawMessage(`{"name": "Ada Lovelace", "mobile": null}`),
		}, u.ID)
		if err != nil {
			return err
		}
		account = made[0].ID
		_, err = crm.CreateRecord(ctx, tx, "contacts", json.RawMessage(`{"name": "gone", "work_email": "gone@acme.example", "boss": "`+account.String()+`"}`), u.ID)
		return err
	}))
	admin := pgtest.Admin(t, env.AdminURL)
	before := everything(t, admin, "acme")
	for _, s := range secrets {
		require.Contains(t, before, s, "the test itself")
	}
	done := clone(t, a, acme, "demo", true)
	require.Equal(t, []string{
		"contacts.iban (text)", "contacts.mobile (phone)", "contacts.name (name)", "contacts.street (address)", "contacts.work_email (email)",
		"users.email (email)", "users.name (name)", "users.password_hash (password)",
	}, done.Masking.Masked)
	require.Equal(t, []string{"contacts.notes", "users.metadata"}, done.Masking.Left)
	after := everything(t, admin, "demo")
	for _, s := range secrets {
		require.NotContains(t, after, s)
	}
	for _, s := range []string{"free text", "Engine", "12345678901234567890.10", account.String()} {
		require.Contains(t, after, s, "what is not about people")
	}
	require.Equal(t, before, everything(t, admin, "acme"), "the original is as it was")

	// A person is the same person everywhere: the user's address is the contact's.
	require.NoError(t, env.DB.InTenant(ctx, done.Tenant, postgres.Write, func(tx *postgres.Tx) error {
		users, err := auth.Tenants().Users(ctx, tx, 10, nil)
		require.NoError(t, err)
		require.Len(t, users, 1)
		parsed, err := auth.ParseEmail(users[0].Email)
		require.NoError(t, err)
		require.Equal(t, parsed, users[0].Email, "a masked address is one")
		r, err := crm.RecordByID(ctx, tx, "contacts", account)
		require.NoError(t, err)
		var data map[string]any
		require.NoError(t, json.Unmarshal(r.Data, &data))
		require.Equal(t, users[0].Email, data["work_email"])
		require.Equal(t, users[0].Name, data["name"])
		require.Regexp(t, `^\+\d\d \d\d \d{7}$`, data["mobile"])
		// And what is masked fits: a change that touches nothing is taken.
		_, err = crm.PatchRecord(ctx, tx, "contacts", account, r.Version, json.RawMessage(`{"notes": "changed"}`))
		require.NoError(t, err)
		return nil
	}))
	again := clone(t, a, acme, "again", true)
	require.Equal(t, done.Trailer.Tables, again.Trailer.Tables, "the same becomes the same")
	var name, settings string
	require.NoError(t, admin.QueryRow(ctx, `select name, settings::text from public.tenants where slug = 'demo'`).Scan(&name, &settings))
	require.Equal(t, "demo", name)
	require.Contains(t, settings, `"masked": true`)
}
