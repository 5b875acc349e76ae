package auth

import "strings"

// statements are those of one realm. They are written for the tables {users}, {sessions} and {keys}.
type statements struct {
	addUser, listUsers, userByID, userByEmail, updateUser, disableUser, enableUser, setPassword, changePassword, lockAdmins string
	credential, rehash, startSession, bySession, byKey, touchSession, touchKey                                              string
	endSession, revokeSessions, revokeAll, purgeOwn, purgeExpired                                                           string
	keyOwner, addKey, listKeys, revokeKey                                                                                   string
}

const (
	userColumns = `id, email, name, role, metadata, disabled_at, created_at, updated_at, version`
	keyColumns  = `k.id, k.user_id, u.email, k.name, k.scopes, k.created_at, k.expires_at, k.last_used, k.revoked_at`
)

// render puts a realm's tables, which are constants of this package, into the statements.
func render(users, sessions, keys string) statements {
	r := strings.NewReplacer("{users}", users, "{sessions}", sessions, "{keys}", keys,
		"{user}", userColumns, "{key}", keyColumns)
	return statements{
		addUser: r.Replace(`insert into {users} (id, email, name, role, password_hash, metadata)
values ($1, $2, $3, $4, $5, $6) returning {user}`),
		listUsers: r.Replace(`select {user} from {users}
where $1::uuid is null or id > $1 order by id limit $2`),
		userByID:    r.Replace(`select {user} from {users} where id = $1`),
		userByEmail: r.Replace(`select {user} from {users} where email = $1`),
		updateUser: r.Replace(`update {users}
set name = $3, role = $4, metadata = $5, version = version + 1, updated_at = now()
where id = $1 and version = $2 returning {user}`),
		disableUser: r.Replace(`update {users}
set disabled_at = coalesce(disabled_at, now()), version = version + 1, updated_at = now()
where id = $1 returning {user}`),
		enableUser: r.Replace(`update {users} set disabled_at = null, version = version + 1, updated_at = now()
where id = $1 returning {user}`),
		setPassword: r.Replace(`update {users} set password_hash = $2, version = version + 1, updated_at = now()
where id = $1 returning {user}`),
		changePassword: r.Replace(`update {users} set password_hash = $2, version = version + 1, updated_at = now()
where id = $1 and password_hash = $3 and disabled_at is null returning {user}`),
		// In the order of their ids, so that two callers who would each take the other's last administrator wait for
		// one another instead.
		lockAdmins: r.Replace(`select id from {users}
where role = 'admin' and disabled_at is null order by id for update`),

		credential: r.Replace(`select id, password_hash from {users} where email = $1 and disabled_at is null`),
		rehash:     r.Replace(`update {users} set password_hash = $3 where id = $1 and password_hash = $2`),
		startSession: r.Replace(`insert into {sessions} (token_hash, user_id, expires_at, user_agent, remote)
select $1, u.id, now() + $4::interval, $5, $6 from {users} u
where u.id = $2 and u.password_hash = $3 and u.disabled_at is null for share of u
returning expires_at`),
		bySession: r.Replace(`select u.id, u.email, u.name, u.role, s.expires_at, s.last_seen
from {sessions} s join {users} u on u.id = s.user_id
where s.token_hash = $1 and s.expires_at > now() and s.last_seen > now() - $2::interval and u.disabled_at is null`),
		byKey: r.Replace(`select u.id, u.email, u.name, u.role, k.scopes, k.expires_at, k.last_used
from {keys} k join {users} u on u.id = k.user_id
where k.token_hash = $1 and k.revoked_at is null and (k.expires_at is null or k.expires_at > now())
and u.disabled_at is null`),
		touchSession: r.Replace(`update {sessions} set last_seen = now()
where token_hash = $1 and last_seen < now() - interval '1 minute'`),
		touchKey: r.Replace(`update {keys} set last_used = now()
where token_hash = $1 and (last_used is null or last_used < now() - interval '1 minute')`),

		endSession:     r.Replace(`delete from {sessions} where token_hash = $1`),
		revokeSessions: r.Replace(`delete from {sessions} where user_id = $1 returning token_hash`),
		revokeAll:      r.Replace(`delete from {sessions} returning token_hash`),
		purgeOwn: r.Replace(`delete from {sessions}
where user_id = $1 and (expires_at <= now() or last_seen <= now() - $2::interval)`),
		purgeExpired: r.Replace(`delete from {sessions}
where expires_at <= now() or last_seen <= now() - $1::interval`),

		// One key of a user at a time, so that the count in the next statement is that of all that were made before.
		keyOwner: r.Replace(`select email, role, $2::timestamptz is null or $2 > now() from {users}
where id = $1 and disabled_at is null for no key update`),
		addKey: r.Replace(`insert into {keys} (id, token_hash, user_id, name, scopes, expires_at)
select $1, $2, $3, $4, $5, $6 where $7 > (select count(*) from {keys}
where user_id = $3 and revoked_at is null and (expires_at is null or expires_at > now())) returning created_at, expires_at`),
		listKeys: r.Replace(`select {key} from {keys} k join {users} u on u.id = k.user_id
where ($1::uuid is null or k.user_id = $1) and ($2::uuid is null or k.id > $2) order by k.id limit $3`),
		revokeKey: r.Replace(`update {keys} set revoked_at = coalesce(revoked_at, now())
where id = $1 and ($2::uuid is null or user_id = $2) returning token_hash`),
	}
}
