package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// relisten bounds the pause between two tries to listen.
const relisten = 10 * time.Second

// Listen calls fn with the payload of each notification on a channel of the group's database, until ctx ends. It has a
// connection of its own, by DirectURL: a pooler in transaction mode takes LISTEN and delivers nothing. A connection that
// is lost is made again, at jittered and growing intervals; what was sent meanwhile is lost, so onConnect is called
// whenever the connection has begun to listen, for the caller to read what it would have been told. Both are called one
// at a time, and hold up what comes after. The error is nil unless the group is not configured or its URL cannot be read.
func (db *DB) Listen(ctx context.Context, name, channel string, onConnect func(), fn func(payload string)) error {
	g, err := db.group(name)
	if err != nil {
		return err
	}
	cfg, err := g.config(g.urls.DirectURL, 1)
	if err != nil {
		return err
	}
	// Nothing is at work on the server that a request to cancel could end: the socket's deadline does.
	cfg.ConnConfig.BuildContextWatcherHandler = func(pc *pgconn.PgConn) ctxwatch.Handler {
		return &pgconn.DeadlineContextWatcherHandler{Conn: pc.Conn()}
	}
	told := false
	for attempt := 0; ctx.Err() == nil; attempt++ {
		began := time.Now()
		listened, err := listen(ctx, cfg.ConnConfig, channel, onConnect, fn)
		if ctx.Err() != nil {
			break
		}
		if listened {
			told = false
			if time.Since(began) > relisten {
				attempt = 0
			}
		}
		if !told {
			g.opts.Logger.WarnContext(ctx, "listening was interrupted and is tried again", "group", name, "channel", channel,
				"error", fault.Of(Fault(err)).Error())
			told = true
		}
		rest(ctx, jittered(min(100*time.Millisecond<<min(attempt, 10), relisten)))
	}
	return nil
}

// listen does it on one connection until that is lost, and reports whether it had begun.
func listen(ctx context.Context, cfg *pgx.ConnConfig, channel string, onConnect func(), fn func(string)) (bool, error) {
	c, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return false, err
	}
	defer func() {
		bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = c.Close(bye) // it has nothing to lose
	}()
	if _, err := c.Exec(ctx, "listen "+Quote(channel), outsideTx); err != nil {
		return false, fmt.Errorf("listen: %w", err)
	}
	onConnect()
	for {
		n, err := c.WaitForNotification(ctx)
		if err != nil {
			return true, err
		}
		fn(n.Payload)
	}
}
