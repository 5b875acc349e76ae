package migrate

import (
	"context"
	"strings"

	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// creation is a step for a schema that has just been made: nobody uses it, and it has the rows that the steps before
// have put there. So everything goes in one transaction: without concurrently and vacuum, and a data migration as one
// batch of all rows.
func creation(f File) string {
	switch f.Kind {
	case NoTransaction:
		return plainText(f.Up)
	case Data:
		if f.sized {
			return withSize(f.Up, maxBatch)
		}
	}
	return f.Up
}

// CreationScript is every tenant migration in SQL as one text, for a schema that has just been made. Steps in Go are
// left out: see Create.
func (m *Migrator) CreationScript() string { return m.CreationScriptTo(m.Head(TenantSet)) }

// CreationScriptTo is CreationScript up to a version, from 0, which gives nothing, to Head.
func (m *Migrator) CreationScriptTo(version int) string {
	var b strings.Builder
	for _, f := range m.sets[TenantSet][:version] {
		if f.code == nil {
			b.WriteString(creation(f))
			b.WriteString("\n;\n")
		}
	}
	return b.String()
}

// Create runs the tenant migrations up to a version, from 0 to Head, in a schema that has just been made, in the caller's
// transaction: as one message, unless there are steps in Go. before is SQL that makes the schema and binds to it, after is SQL that follows; both
// are constants and quoted identifiers. The caller writes the placement, with the version and Reader, and the ledger rows with
// Record. The faults are those of Tenant; what before and after fail by is not changed.
func (m *Migrator) Create(ctx context.Context, tx *postgres.OwnerTx, schema tenant.Schema, version int, before, after string) error {
	return m.create(ctx, tx, schema, m.sets[TenantSet][:version], before, after)
}

// Advance brings a schema that nobody uses yet, but that may have rows, from one version to another, as Create would
// have: in the caller's transaction, data migrations as one batch. The caller writes the placement and the ledger rows.
func (m *Migrator) Advance(ctx context.Context, tx *postgres.OwnerTx, schema tenant.Schema, from, to int) error {
	return m.create(ctx, tx, schema, m.sets[TenantSet][from:to], "set local search_path to "+postgres.Quote(schema.String())+", ext, pg_temp;\n", "")
}

func (m *Migrator) create(ctx context.Context, tx *postgres.OwnerTx, schema tenant.Schema, files []File, before, after string) error {
	sc := &script{lead: len(statementsOf(before))}
	sc.b.WriteString(before)
	retire(tx, files)
	send := func() error {
		done, err := tx.Run(ctx, sc.text())
		if err != nil {
			return sc.failed(err, done)
		}
		return nil
	}
	for _, f := range files {
		if f.code == nil {
			text := creation(f)
			sc.add(f, text, statementsOf(text))
			continue
		}
		if err := send(); err != nil {
			return err
		}
		sc = &script{}
		if err := tx.Bind(ctx, schema); err != nil {
			return err
		}
		if err := guarded(f, func() error { return f.runOnce(ctx, tx) }); err != nil {
			return funcFailed(err, f)
		}
	}
	sc.b.WriteString(after)
	if sc.b.Len() == 0 {
		return nil
	}
	return send()
}

// runOnce runs a step in Go from its beginning to its end, in one transaction.
func (f File) runOnce(ctx context.Context, tx *postgres.OwnerTx) error {
	if f.code.Up != nil {
		return f.code.Up(ctx, tx)
	}
	for range freeBatches {
		changed, err := f.code.Batch(ctx, tx, maxBatch)
		if err != nil || changed <= 0 {
			return err
		}
	}
	return endless(f, 0, freeBatches)
}
