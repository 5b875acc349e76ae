package schedule

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Schema is where River's tables are: in the main group's database, the owner's, and closed to everybody else.
const Schema = "river"

const (
	riverConns = 4
	// lockWait is how long one waits for another process that migrates.
	lockWait = time.Minute
)

// riverTables are River's own migrations, on connections of their own.
type riverTables struct {
	*rivermigrate.Migrator[pgx.Tx]
	exec  func(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	close func()
}

func openRiverTables(db *postgres.DB) (*riverTables, error) {
	pool, err := db.OwnerPool(postgres.MainGroup, 2)
	if err != nil {
		return nil, err
	}
	m, err := rivermigrate.New(riverpgxv5.New(pool), &rivermigrate.Config{Schema: Schema, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		pool.Close()
		return nil, err
	}
	return &riverTables{m, pool.Exec, pool.Close}, nil
}

// Behind returns nil when River's tables are as this binary needs them, and otherwise a fault of the kind Pending.
func Behind(ctx context.Context, db *postgres.DB) error {
	m, err := openRiverTables(db)
	if err != nil {
		return err
	}
	defer m.close()
	return m.behind(ctx)
}

func (m *riverTables) behind(ctx context.Context) error {
	res, err := m.Validate(ctx, nil)
	if err != nil {
		return postgres.Fault(fmt.Errorf("read the version of River's tables: %w", err))
	}
	if res.OK {
		return nil
	}
	return fault.New(fault.Pending, "River's tables for schedules are behind: %s", strings.Join(res.Messages, "; ")).
		WithCode("shared_behind").WithHint("oneo migrate --shared")
}

// Migrate brings River's tables to the version that this binary needs. Of several processes one does it and the others wait.
func Migrate(ctx context.Context, db *postgres.DB) error {
	m, err := openRiverTables(db)
	if err != nil {
		return err
	}
	defer m.close()
	if err := m.behind(ctx); err == nil || !fault.Is(err, fault.Pending) {
		return err
	}
	return db.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		// The lock of the shared migrations; River's own run on another connection, each in its transaction.
		if err := tx.LockOperation(ctx, 0, lockWait); err != nil {
			return err
		}
		if err := m.behind(ctx); err == nil || !fault.Is(err, fault.Pending) {
			return err
		}
		const room = `create schema if not exists ` + Schema + `; revoke all on schema ` + Schema + ` from public`
		if _, err := m.exec(ctx, room, pgx.QueryExecModeSimpleProtocol); err != nil {
			return fmt.Errorf("make the schema %s: %w", Schema, err)
		}
		if _, err := m.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
			return fmt.Errorf("migrate River's tables: %w", err)
		}
		return nil
	})
}
