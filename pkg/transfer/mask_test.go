package transfer_test

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/mask"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// people are tables whose columns' comments say what they hold of people.
const people = `
create domain address_of_mail as text check (value like '%@%.%');
create table people (
	id integer primary key, email address_of_mail unique not null, "Full ""Name" varchar(60), phone varchar(20) check (phone ~ '^\+[0-9 ]+$'),
	padded char(80), notes text, born date, account text, extra jsonb, lower text generated always as (lower(email)) stored, tags text[]);
comment on column people.email is 'where to write to; oneo:mask=email';
comment on column people."Full ""Name" is 'oneo:mask=name';
comment on column people.phone is 'oneo:mask=phone';
comment on column people.padded is 'oneo:mask=address';
comment on column people.born is 'oneo:mask=text';
comment on column people.account is 'oneo:mask=iban';
comment on column people.extra is 'oneo:mask=text';
comment on column people.tags is 'oneo:mask=name';
create table orders (id integer primary key, by text references people (email), street text, paid numeric);
create table events (at integer, who text references people (email), what text) partition by range (at);
comment on column events.what is 'oneo:mask=none';
create table events_1 partition of events for values from (0) to (10);
create table events_2 partition of events for values from (10) to (20);
create table log (id integer primary key, line text);
create table numbers (n integer);
create materialized view addresses as select email, lower from people;
`

const peopleRows = `
insert into people (id, email, "Full ""Name", phone, padded, notes, born, account, extra, tags) values
	(1, 'Ada@Acme.example', E'Ada\tLove\\lace\n', '+44 20 7654321', '12 Secret Street', 'free', '1815-12-10', 'DE89', '{"nick": "Countess", "n": [7777777, null, true]}', '{Duchess}'),
	(2, 'ada@acme.example', '', null, null, null, null, null, null, null),
	(3, 'grace@acme.example', 'Grace', '+1 555 7654321', '12 Secret Street', E'\\N', null, null, '"Commodore"', null);
insert into orders values (1, 'Ada@Acme.example', 'kept', 1.50), (2, null, null, null);
insert into events values (1, 'Ada@Acme.example', 'opened'), (11, 'grace@acme.example', 'closed');
insert into log values (1, 'a line'); insert into numbers values (1);
refresh materialized view addresses;
`

// What the comments of a product's own migrations mark is masked, what is tied to it by a foreign key with it, and what
// cannot be is told; all constraints hold.
func TestMaskedColumns(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(people)
	one := f.tenant(p, "acme")
	f.in(one, peopleRows)
	masked := func(o *transfer.CloneOptions) { o.Mask = true }
	done, err := f.clone(p, one, "copy", masked)
	require.NoError(t, err)
	two := done.Tenant
	require.Equal(t, []string{
		"events_1.who (email)", "events_2.who (email)", "orders.by (email)", `people.Full "Name (name)`, "people.email (email)", "people.extra (text)", "people.padded (address)", "people.phone (phone)",
	}, done.Masking.Masked)
	require.Equal(t, []string{"people.account (iban, which is no kind)", "people.born (text, of type date)", "people.tags (name, of type _text)", "table log"}, done.Masking.Left)

	m := mask.New(pgtest.Secret)
	ada := m.Value(mask.Email, "Ada@Acme.example")
	for ask, want := range map[string]string{
		`select email from people where id = 1`:                             ada,
		`select by from orders where id = 1`:                                ada,
		`select who from events where at = 1`:                               ada,
		`select email from people where id = 2`:                             m.Value(mask.Email, "ada@acme.example"),
		`select lower from people where id = 1`:                             ada,
		`select email from addresses where lower = '` + ada + `'`:           ada,
		`select "Full ""Name" from people where id = 1`:                     m.Value(mask.Name, "Ada\tLove\\lace\n"),
		`select count(*) from people where "Full ""Name" = ''`:              "1",
		`select phone from people where id = 1`:                             m.Value(mask.Phone, "+44 20 7654321"),
		`select trim(padded) from people where id = 3`:                      m.Value(mask.Address, "12 Secret Street"),
		`select extra ->> 'nick' from people where id = 1`:                  m.Value(mask.Text, "Countess"),
		`select count(*) from people where padded is null and born is null`: "1",
		`select street || paid from orders where id = 1`:                    "kept1.50",
		`select string_agg(what, ',' order by at) from events`:              "opened,closed",
		`select notes from people where id = 3`:                             `\N`,
	} {
		require.Equal(t, want, f.ask(two, ask), ask)
	}
	all := f.everything("copy")
	for _, s := range []string{"Ada", "ada@", "Acme", "lace", "Grace", "7654321", "Secret", "Countess", "Commodore", "7777777"} {
		require.NotContains(t, all, s)
	}
	f.Invariants(t)

	// The same becomes the same, whatever tenant it is of.
	again, err := f.clone(p, one, "again", masked)
	require.NoError(t, err)
	require.Equal(t, done.Trailer.Tables, again.Trailer.Tables)
	other := f.tenant(p, "other")
	f.in(other, peopleRows)
	again, err = f.clone(p, other, "more", masked)
	require.NoError(t, err)
	require.Equal(t, done.Trailer.Tables, again.Trailer.Tables)
}

// everything is all that a schema holds, as text.
func (f *fixture) everything(schema string) string {
	f.t.Helper()
	rows, err := f.admin.Query(f.t.Context(), `select format('select coalesce(string_agg(x::text, chr(10)), '''') from %I.%I x', n.nspname, c.relname)
from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = $1 and c.relkind in ('r', 'p', 'm')`, schema)
	require.NoError(f.t, err)
	asks, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(f.t, err)
	require.NotEmpty(f.t, asks)
	var all strings.Builder
	for _, ask := range asks {
		var text string
		require.NoError(f.t, f.admin.QueryRow(f.t.Context(), ask).Scan(&text))
		all.WriteString(text + "\n")
	}
	return all.String()
}

// Of many rows no value is left, no two become one, and rows are as many as they were.
func TestMaskedRowsStayUnique(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(`create table people (id integer primary key, email text unique not null, phone text unique not null);
comment on column people.email is 'oneo:mask=email'; comment on column people.phone is 'oneo:mask=phone'`)
	one := f.tenant(p, "acme")
	f.in(one, `insert into people select i, 'person' || i || '@acme.example', to_char(i, 'fm000000') from generate_series(1, 20000) i`)
	done, err := f.clone(p, one, "copy", func(o *transfer.CloneOptions) { o.Mask = true })
	require.NoError(t, err)
	require.Equal(t, "20000", f.ask(done.Tenant, `select count(*) from people where email ~ '^[a-z2-7]{24}@example\.invalid$' and phone ~ '^[0-9]{6}$'`))
	require.Zero(t, f.count(`select count(*) from acme.people a join copy.people c using (email)`))
	require.Less(t, f.count(`select count(*) from acme.people a join copy.people c using (id, phone)`), 5, "one in a million stays by chance")
}

// A masked clone of which nothing would be masked is refused, as are marks that contradict each other, and what does not fit: nothing is left.
func TestMaskRefused(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ up, want string }{
		{`create table people (email text)`, "nothing in the tenant's tables is marked"},
		{`create table people (email text primary key); create table orders (by text references people);
comment on column people.email is 'oneo:mask=email'; comment on column orders.by is 'oneo:mask=name'`, "to which it refers"},
		{`create table people (email varchar(20)); comment on column people.email is 'oneo:mask=email'`, "people.email holds at most 20 characters"},
	} {
		f := newFixture(t)
		p := f.with(c.up)
		one := f.tenant(p, "acme")
		_, err := f.clone(p, one, "copy", func(o *transfer.CloneOptions) { o.Mask = true })
		require.True(t, fault.Is(err, fault.Invalid), "%v", err)
		require.ErrorContains(t, err, c.want)
		f.nothing("copy")
	}
}
