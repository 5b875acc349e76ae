package auth_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

func TestKeys(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		ada, bob := p.add(t, "ada@example.com", ""), p.add(t, "bob@example.com", "")
		k, token := p.key(t, ada, auth.ScopeAdmin, auth.ScopeAdmin)
		other, otherToken := p.key(t, bob, auth.ScopeAdmin)
		require.Equal(t, "ada@example.com", k.Email)
		require.Equal(t, []string{auth.ScopeAdmin}, k.Scopes, "each scope once")
		kind, ok := p.realm.ParseToken(token)
		require.True(t, ok)
		require.Equal(t, auth.KindKey, kind)
		i, err := p.who(t, token)
		require.NoError(t, err)
		require.Equal(t, auth.Identity{Realm: p.realm.Name(), UserID: ada.ID, Email: ada.Email, Role: ada.Role, Kind: auth.KindKey,
			TokenHash: auth.HashToken(token), Scopes: []string{auth.ScopeAdmin}}, i)
		require.NoError(t, i.May(auth.ManageKeys))

		var all, own []auth.Key
		require.NoError(t, p.in(t.Context(), postgres.Read, func(q postgres.Querier) (err error) {
			all, err = p.realm.Keys(t.Context(), q, nil)
			require.NoError(t, err)
			own, err = p.realm.Keys(t.Context(), q, &bob.ID)
			return err
		}))
		require.Equal(t, []auth.Key{k, other}, all, "as they were when they were made")
		require.Equal(t, []auth.Key{other}, own)
		raw, err := json.Marshal(all)
		require.NoError(t, err)
		require.NotContains(t, string(raw), token[4:])
		require.NotContains(t, string(raw), "hash")
		require.Zero(t, value[int](t, p, `select count(*) from {keys} k where k::text like '%' || $1 || '%'`, token[4:]),
			"a token is stored as a hash only")

		revoke := func(id uuid.UUID, of *uuid.UUID) (hash []byte, err error) {
			err = p.write(t, func(q postgres.Querier) (err error) {
				hash, err = p.realm.RevokeKey(t.Context(), q, id, of)
				return err
			})
			return hash, err
		}
		_, err = revoke(other.ID, &ada.ID)
		requireFault(t, err, fault.NotFound, "unknown_key")
		_, err = revoke(uuid.New(), nil)
		requireFault(t, err, fault.NotFound, "unknown_key")
		_, err = p.who(t, otherToken)
		require.NoError(t, err, "what was refused revoked nothing")

		h, err := revoke(k.ID, &ada.ID)
		require.NoError(t, err)
		require.Equal(t, auth.HashToken(token), h)
		p.requireUnknown(t, token, "a revoked key")
		at := value[time.Time](t, p, `select revoked_at from {keys} where id = $1`, k.ID)
		_, err = revoke(k.ID, nil)
		require.NoError(t, err, "once more does nothing")
		require.Equal(t, at, value[time.Time](t, p, `select revoked_at from {keys} where id = $1`, k.ID))
		_, err = p.who(t, otherToken)
		require.NoError(t, err)
		_, err = revoke(other.ID, nil)
		require.NoError(t, err, "without a user: anybody's")
	})
}

func TestKeysEnd(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", "")
		add := func(expires time.Time) (k auth.Key, token string, err error) {
			err = p.write(t, func(q postgres.Querier) (err error) {
				k, token, err = p.realm.AddKey(t.Context(), q, u.ID, "ci", []string{auth.ScopeAdmin}, &expires)
				return err
			})
			return k, token, err
		}
		_, _, err := add(time.Now().Add(-time.Hour))
		requireFault(t, err, fault.Unfit, "unfit")
		require.Equal(t, "/expires_at", fault.Of(err).Fields[0].Pointer)
		require.Zero(t, value[int](t, p, `select count(*) from {keys}`))

		end := time.Now().Add(time.Hour).Truncate(time.Microsecond)
		k, token, err := add(end)
		require.NoError(t, err)
		require.True(t, k.ExpiresAt.Equal(end))
		i, err := p.who(t, token)
		require.NoError(t, err)
		require.True(t, i.ExpiresAt.Equal(end))
		p.sql(t, `update {keys} set expires_at = now()`)
		p.requireUnknown(t, token, "a key at its end")
	})
}

func TestKeysAreNoMoreThanTheirUser(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		type try struct {
			role   string
			scopes []string
			want   string // scopes, or the code of a refusal
		}
		tries := []try{
			{auth.RoleAdmin, nil, "unknown_scope"},
			{auth.RoleAdmin, []string{"read"}, "unknown_scope"},
			{auth.RoleAdmin, []string{"write", "admin"}, "unknown_scope"},
			{auth.RoleAdmin, []string{"admin"}, "admin"},
		}
		if !p.tenant.IsZero() {
			tries = []try{
				{auth.RoleAdmin, nil, "read"},
				{auth.RoleAdmin, []string{"write", "admin", "read"}, "admin read write"},
				{auth.RoleMember, []string{"read", "write"}, "read write"},
				{auth.RoleMember, []string{"admin"}, "beyond_role"},
				{auth.RoleMember, []string{"read", "admin"}, "beyond_role"},
				{auth.RoleViewer, []string{"read"}, "read"},
				{auth.RoleViewer, []string{"write"}, "beyond_role"},
				{auth.RoleAdmin, []string{"root"}, "unknown_scope"},
				{auth.RoleAdmin, []string{""}, "unknown_scope"},
				{auth.RoleAdmin, []string{"READ"}, "unknown_scope"},
			}
		}
		users := map[string]auth.User{}
		for _, role := range p.realm.Roles() {
			users[role] = p.add(t, role+"@example.com", role)
		}
		for _, tc := range tries {
			var k auth.Key
			var token string
			err := p.write(t, func(q postgres.Querier) (err error) {
				k, token, err = p.realm.AddKey(t.Context(), q, users[tc.role].ID, "ci", tc.scopes, nil)
				return err
			})
			if err != nil {
				require.Truef(t, fault.Is(err, fault.Unfit), "%+v: %v", tc, err)
				require.Equalf(t, "/scopes", fault.Of(err).Fields[0].Pointer, "%+v", tc)
				require.Equalf(t, tc.want, fault.Of(err).Fields[0].Code, "%+v", tc)
				require.Empty(t, token)
				continue
			}
			require.Equalf(t, tc.want, strings.Join(k.Scopes, " "), "%+v", tc)
		}
		for _, name := range []string{"", strings.Repeat("ä", 101), "a\nb", "\xff"} {
			err := p.write(t, func(q postgres.Querier) error {
				_, _, err := p.realm.AddKey(t.Context(), q, users[auth.RoleAdmin].ID, name, []string{"admin"}, nil)
				return err
			})
			requireFault(t, err, fault.Unfit, "unfit")
			require.Equal(t, "/name", fault.Of(err).Fields[0].Pointer)
		}
		err := p.write(t, func(q postgres.Querier) error {
			_, _, err := p.realm.AddKey(t.Context(), q, uuid.New(), "ci", []string{"admin"}, nil)
			return err
		})
		requireFault(t, err, fault.NotFound, "unknown_user")
	})
}

func TestAUserHasABoundOfKeys(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		ada, bob := p.add(t, "ada@example.com", ""), p.add(t, "bob@example.com", "")
		first, _ := p.key(t, ada, auth.ScopeAdmin)
		// Those that ended do not count.
		p.sql(t, `insert into {keys} (id, token_hash, user_id, name, expires_at, revoked_at)
select gen_random_uuid(), decode(md5(n::text) || md5(n::text), 'hex'), $1, 'old',
	case when n % 2 = 0 then now() - interval '1 hour' end, case when n % 2 = 1 then now() end from generate_series(1, 20) n`, ada.ID)
		p.sql(t, `insert into {keys} (id, token_hash, user_id, name, expires_at)
select gen_random_uuid(), decode(md5(n::text) || md5(n::text), 'hex'), $1, 'live', now() + interval '1 hour'
from generate_series(1001, $2::int) n`, ada.ID, 1000+auth.MaxKeys-2)
		add := func(u auth.User) error {
			return p.write(t, func(q postgres.Querier) error {
				_, _, err := p.realm.AddKey(t.Context(), q, u.ID, "one more", []string{auth.ScopeAdmin}, nil)
				return err
			})
		}
		// Two at once for the last place: the second waits for the first, and counts it.
		errs := make(chan error, 1)
		p.must(t, func(q postgres.Querier) error {
			_, _, err := p.realm.AddKey(t.Context(), q, ada.ID, "the last", []string{auth.ScopeAdmin}, nil)
			go func() { errs <- add(ada) }()
			p.blocked(t)
			return err
		})
		requireFault(t, <-errs, fault.Conflict, "too_many_keys")
		p.key(t, bob, auth.ScopeAdmin)
		p.must(t, func(q postgres.Querier) error {
			_, err := p.realm.RevokeKey(t.Context(), q, first.ID, nil)
			return err
		})
		p.key(t, ada, auth.ScopeAdmin)
	})
}
