package backup

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// lockCatalogue is the first key of the advisory lock of those who take backups away or keep them; the second is 0.
const lockCatalogue = 7302661

// alone runs fn while nobody else of this installation takes backups away or keeps them. Locked: somebody does. still is
// asked before each thing that cannot be taken back: the lock may be lost with its connection.
func (b *Backups) alone(ctx context.Context, fn func(still func() error) error) error {
	return b.o.DB.OwnerSession(ctx, postgres.MainGroup, func(ses *postgres.Session) error {
		var got bool
		if err := ses.QueryRow(ctx, `select pg_catalog.pg_try_advisory_lock($1::int4, 0)`, lockCatalogue).Scan(&got); err != nil {
			return err
		}
		if !got {
			return fault.New(fault.Locked, "somebody else is taking backups away, or keeps one").WithCode("catalogue_busy").WithRetry(time.Second).
				WithHint("wait until it is done, then run the command again")
		}
		// The lock ends with the session, but that ends a moment after its connection: who prunes tenant by tenant would meet it.
		defer func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			_ = ses.Script(ctx, fmt.Sprintf("select pg_catalog.pg_advisory_unlock(%d, 0)", lockCatalogue))
		}()
		return fn(func() error { return ses.Script(ctx, "select 1") })
	})
}

// Proof is the last restore of a tenant that was proved.
type Proof struct {
	Backup   string // its id
	Made     time.Time
	ProvedAt time.Time
	Rows     int64
	Duration time.Duration
}

// Remember notes that a backup of a tenant was restored. An older backup does not replace a newer one's proof.
func (b *Backups) Remember(ctx context.Context, number int32, m Manifest, took time.Duration) error {
	const note = `insert into public.proofs (tenant, backup, made_at, rows, duration_ms) values ($1, $2, $3, $4, $5)
on conflict (tenant) do update set backup = excluded.backup, made_at = excluded.made_at, proved_at = excluded.proved_at,
	rows = excluded.rows, duration_ms = excluded.duration_ms where proofs.made_at <= excluded.made_at`
	return b.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		_, err := tx.Exec(ctx, note, number, m.ID, m.Made, m.Rows, took.Milliseconds())
		return err
	})
}

// Proofs are the last proved restores, by the numbers of the tenants.
func (b *Backups) Proofs(ctx context.Context) (map[int32]Proof, error) {
	proofs := map[int32]Proof{}
	err := b.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, `select tenant, backup, made_at, proved_at, rows, duration_ms from public.proofs`)
		if err != nil {
			return err
		}
		var number int32
		var p Proof
		var ms int64
		_, err = pgx.ForEachRow(rows, []any{&number, &p.Backup, &p.Made, &p.ProvedAt, &p.Rows, &ms}, func() error {
			p.Duration = time.Duration(ms) * time.Millisecond
			proofs[number] = p
			return nil
		})
		return err
	})
	return proofs, err
}
