package lint

// Rule is one thing that the linter looks for.
type Rule struct {
	Name     string
	Severity Severity
	// TenantOnly rules do not apply to the shared schema's migrations.
	TenantOnly bool
	// Finds says what is found, for the documentation.
	Finds string
	// Instead says how to write it.
	Instead string
}

// Names of the rules, as `-- oneo: allow` and the findings have them.
const (
	ruleSyntax       = "syntax"
	ruleEmpty        = "empty"
	ruleBadAllow     = "bad-allow"
	ruleUnusedAllow  = "unused-allow"
	ruleUnseen       = "unseen-sql"
	ruleLongName     = "long-name"
	ruleMissingDown  = "missing-down"
	ruleForeign      = "foreign-schema"
	ruleCrossKey     = "cross-schema-foreign-key"
	ruleSearchPath   = "search-path"
	ruleSchema       = "schema"
	ruleOutside      = "outside-tenant"
	ruleType         = "tenant-type"
	ruleExtension    = "extension"
	ruleRights       = "rights"
	ruleDefiner      = "security-definer"
	ruleStar         = "select-star"
	ruleControl      = "transaction-control"
	ruleSession      = "session-state"
	ruleInTx         = "not-in-transaction"
	ruleTypeRewrite  = "type-rewrite"
	ruleColRewrite   = "column-rewrite"
	ruleTableRewrite = "table-rewrite"
	ruleRequired     = "required-column"
	ruleSetNotNull   = "set-not-null"
	ruleAddCheck     = "add-check"
	ruleAddKey       = "add-foreign-key"
	ruleAddUnique    = "add-unique"
	ruleExclusion    = "add-exclusion"
	ruleValidateFile = "validate-same-file"
	ruleValidateTx   = "validate-in-transaction"
	ruleCreateIndex  = "create-index"
	ruleReindex      = "reindex"
	ruleDropIndex    = "drop-index"
	ruleRefresh      = "refresh-view"
	ruleLockTable    = "lock-table"
	ruleBreaking     = "breaking-change"
	ruleBreakApart   = "breaking-apart"
	ruleDropData     = "drop-data"
	ruleCascade      = "cascade"
	ruleTruncate     = "truncate"
	ruleNoWhere      = "dml-without-where"
	ruleUnbounded    = "dml-unbounded"
	ruleDataOne      = "data-statement"
	ruleDataLimit    = "data-no-limit"
	ruleDataEndless  = "data-endless"
)

var rules = []Rule{
	{Name: ruleSyntax, Severity: Error, Finds: "a statement that PostgreSQL 17's parser cannot read; the others of the file are read all the same",
		Instead: "mend it; for what only a newer PostgreSQL understands, allow it with a reason"},
	{Name: ruleEmpty, Severity: Error, Finds: "a file without a statement: applied, it would count as done",
		Instead: "write the statements, or delete the file"},
	{Name: ruleBadAllow, Severity: Error, Finds: "`-- oneo: allow` with a rule that there is not, or without a reason",
		Instead: "-- oneo: allow RULE why it is right here"},
	{Name: ruleUnusedAllow, Severity: Warning, Finds: "`-- oneo: allow` above lines in which the rule finds nothing",
		Instead: "delete the line"},
	{Name: ruleUnseen, Severity: Warning, TenantOnly: true, Finds: "SQL that is put together as it runs, or a body in a language that is not read",
		Instead: "write the statement out; otherwise see to it yourself that it names no schema and takes no long lock"},
	{Name: ruleLongName, Severity: Error, Finds: "a name of more than 63 bytes, which PostgreSQL cuts in silence",
		Instead: "a shorter name"},
	{Name: ruleMissingDown, Severity: Warning, TenantOnly: true, Finds: "a step up without a step down",
		Instead: "write NNNN_name.down.sql; without it `oneo migrate down` refuses, and an undo point is the way back"},

	{Name: ruleForeign, Severity: Error, TenantOnly: true, Finds: "a name qualified with a schema other than ext, pg_catalog and pg_temp, also in a literal that names a table; and what makes or changes something in ext",
		Instead: "write the name unqualified: the search path is the tenant's schema, then ext"},
	{Name: ruleCrossKey, Severity: Error, TenantOnly: true, Finds: "a foreign key to a table of another schema",
		Instead: "keep the other row's id without a key, and check it where it is written: a tenant must be movable and restorable by itself"},
	{Name: ruleSearchPath, Severity: Error, Finds: "the search path set by a statement, or to other schemas than ext and pg_catalog by a function",
		Instead: "leave it alone: it is bound to the tenant; a function pins it with `set search_path from current`"},
	{Name: ruleSchema, Severity: Error, TenantOnly: true, Finds: "a schema made, dropped, renamed, or a thing moved into another",
		Instead: "keep everything in the tenant's own schema, which oneo makes"},
	{Name: ruleOutside, Severity: Error, TenantOnly: true, Finds: "what belongs to the database or the server: databases, tablespaces, publications, subscriptions, event triggers, foreign servers, languages, casts, ALTER SYSTEM",
		Instead: "do it once, by hand or by the administrator's own scripts: a tenant's migration runs once for each tenant"},
	{Name: ruleType, Severity: Error, TenantOnly: true, Finds: "an enum, composite type, domain or range in a tenant's schema, made or changed",
		Instead: "text with a check constraint, or a type that the administrator makes once in ext: a statement prepared for one tenant's type fails for the next tenant's"},
	{Name: ruleExtension, Severity: Error, TenantOnly: true, Finds: "an extension made, changed or dropped",
		Instead: "let the administrator make it once in ext; its functions are found through the search path"},
	{Name: ruleRights, Severity: Error, TenantOnly: true, Finds: "roles, grants, owners and default privileges",
		Instead: "leave them out: default privileges give each tenant's role its rights on every new table"},
	{Name: ruleDefiner, Severity: Error, TenantOnly: true, Finds: "a security definer function whose search path is not pinned",
		Instead: "add `set search_path from current`, or make it security invoker"},
	{Name: ruleStar, Severity: Error, TenantOnly: true, Finds: "`select *` or `returning *` in a view, a function or a data statement (`count(*)` and `exists (select * ...)` are fine)",
		Instead: "a list of columns: with a star the same text means other columns for a tenant at another version"},

	{Name: ruleControl, Severity: Error, Finds: "begin, commit, rollback, savepoint and the like",
		Instead: "leave it out: a migration is one transaction together with its ledger row; with `-- oneo: no-transaction` each statement is its own"},
	{Name: ruleSession, Severity: Error, Finds: "what outlives the transaction on a connection that the next tenant uses: SET without LOCAL, set_config(..., false), a temporary table without `on commit drop`, prepare, listen, load, discard, a cursor with hold, session advisory locks",
		Instead: "set local, `on commit drop`, or leave it out"},
	{Name: ruleInTx, Severity: Error, Finds: "what PostgreSQL refuses inside a transaction (`concurrently`, vacuum) in a file that is one",
		Instead: "put it into a file of its own that begins with `-- oneo: no-transaction`"},

	{Name: ruleTypeRewrite, Severity: Error, Finds: "a column's type changed so that every row is written anew; a wider varchar or numeric, varchar to text and the like are not",
		Instead: "add a column of the new type, fill it by NNNN_name.data.sql, write both, then drop the old one (`-- oneo: breaking`)"},
	{Name: ruleColRewrite, Severity: Error, Finds: "a column added with a volatile default, as a stored generated column, as identity or serial: every row is written anew",
		Instead: "add the column without a default, set the default for new rows by another statement, fill the old rows by NNNN_name.data.sql"},
	{Name: ruleTableRewrite, Severity: Error, Finds: "set logged or unlogged, set access method, set tablespace, set expression, cluster, vacuum full",
		Instead: "leave it out; to win back space use pg_repack or pg_squeeze tenant by tenant"},
	{Name: ruleRequired, Severity: Error, Finds: "a column added as not null without a default: it fails for each tenant that has rows",
		Instead: "give it a constant default, or add it nullable, fill it by NNNN_name.data.sql and set not null later"},
	{Name: ruleSetNotNull, Severity: Error, Finds: "set not null, or a primary key, on a column for which no validated check says `is not null`: the table is read through under the lock",
		Instead: "add constraint c check (x is not null) not valid; validate it in a later file with `-- oneo: no-transaction`; then set not null, which reads nothing"},
	{Name: ruleAddCheck, Severity: Error, Finds: "a check constraint added to an existing table without `not valid`, also with a new column",
		Instead: "add it `not valid`, and validate it in a later file with `-- oneo: no-transaction`"},
	{Name: ruleAddKey, Severity: Error, Finds: "a foreign key added to an existing table without `not valid` (a new nullable column without a default needs no reading)",
		Instead: "add it `not valid`, and validate it in a later file with `-- oneo: no-transaction`"},
	{Name: ruleAddUnique, Severity: Error, Finds: "a unique constraint or primary key added to an existing table without `using index`",
		Instead: "create unique index concurrently in a file with `-- oneo: no-transaction`, then add the constraint `using index`"},
	{Name: ruleExclusion, Severity: Error, Finds: "an exclusion constraint added to an existing table: there is no way to do it beside running work",
		Instead: "make a new table with the constraint and copy the rows by NNNN_name.data.sql, or allow it for a time without traffic"},
	{Name: ruleValidateFile, Severity: Error, Finds: "a constraint added `not valid` and validated in the same transaction: the lock of the first statement is held while the second reads the table",
		Instead: "validate it in a later file with `-- oneo: no-transaction`"},
	{Name: ruleValidateTx, Severity: Warning, Finds: "a constraint validated in a transactional file: the steps that a tenant lacks are one transaction, so that another's lock may be held meanwhile",
		Instead: "begin the file with `-- oneo: no-transaction`"},
	{Name: ruleCreateIndex, Severity: Error, Finds: "an index made without `concurrently` on a table that existed before this file",
		Instead: "create index concurrently, in a file that begins with `-- oneo: no-transaction`"},
	{Name: ruleReindex, Severity: Error, Finds: "reindex without `concurrently`",
		Instead: "reindex (concurrently), in a file that begins with `-- oneo: no-transaction`"},
	{Name: ruleDropIndex, Severity: Warning, Finds: "an index of an existing table dropped without `concurrently`",
		Instead: "drop index concurrently, in a file that begins with `-- oneo: no-transaction`"},
	{Name: ruleRefresh, Severity: Warning, Finds: "a materialized view refreshed without `concurrently`",
		Instead: "refresh materialized view concurrently, which needs a unique index on the view"},
	{Name: ruleLockTable, Severity: Error, Finds: "lock table",
		Instead: "leave it out: the statements take the locks that they need, and the operation lock keeps other migrations away"},

	{Name: ruleBreaking, Severity: Error, Finds: "a table, view, column or function dropped or renamed that binaries of the last version use",
		Instead: "first release a binary that does without it, then drop it in a transactional file with the line `-- oneo: breaking`; instead of renaming, add the new one, write both, and drop the old one later"},
	{Name: ruleBreakApart, Severity: Error, Finds: "`-- oneo: breaking` in a file without a transaction or a data file, which cannot keep requests away while it runs; oneo refuses to read it",
		Instead: "the line in a transactional file of its own before it, whose statement may be `select 1`: from then on older binaries refuse the tenant"},
	{Name: ruleDropData, Severity: Warning, Finds: "a table or column dropped with what is in it",
		Instead: "rename it out of the way for a release, or run with --undo-point"},
	{Name: ruleCascade, Severity: Warning, Finds: "`cascade`: it takes along what is not named",
		Instead: "drop by name what depends on it"},
	{Name: ruleTruncate, Severity: Error, Finds: "truncate of a table that existed before this file",
		Instead: "delete in batches by NNNN_name.data.sql"},
	{Name: ruleNoWhere, Severity: Error, Finds: "update or delete of every row of an existing table, in one transaction",
		Instead: "NNNN_name.data.sql: a statement for some thousand rows, repeated until it changes none"},
	{Name: ruleUnbounded, Severity: Warning, Finds: "update, delete, merge or insert ... select over an existing table whose number of rows nothing bounds, in one transaction",
		Instead: "NNNN_name.data.sql: a statement for some thousand rows, repeated until it changes none"},
	{Name: ruleDataOne, Severity: Error, Finds: "a data file that is not exactly one insert, update or delete",
		Instead: "one statement a file; what changes tables goes into NNNN_name.up.sql"},
	{Name: ruleDataLimit, Severity: Error, Finds: "a data file whose statement has no limit: its first batch is everything",
		Instead: "where id in (select id from t where ... limit $1): $1 is the size of a batch"},
	{Name: ruleDataEndless, Severity: Error, Finds: "a data file whose statement finds the same rows again: an update that no condition on a changed column ends, an insert without `not exists` or `on conflict do nothing`",
		Instead: "let the condition exclude what is done: where new_column is null ..., or where not exists (...)"},
}

// Rules are all rules, in the order of the documentation.
func Rules() []Rule { return append([]Rule{}, rules...) }

func ruleNamed(name string) (Rule, bool) {
	for _, r := range rules {
		if r.Name == name {
			return r, true
		}
	}
	return Rule{}, false
}
