package main

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// record is what every contender answers.
type record struct {
	ID        string          `json:"id"`
	Data      json.RawMessage `json:"data"`
	Version   int             `json:"version"`
	CreatedAt time.Time       `json:"created_at"`
	UpdatedAt time.Time       `json:"updated_at"`
}

// serveFloor is a child process of the benchmark: a gin handler that reads one record by its id. mode "floor" reads a
// fixed, qualified table by a prepared statement, whatever the host; mode "naive" binds as most libraries do: begin,
// set local search_path, query, commit.
func serveFloor(mode, url, addr, schema string) error {
	gin.SetMode(gin.ReleaseMode)
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return err
	}
	cfg.MaxConns = 16
	pool, err := pgxpool.NewWithConfig(context.Background(), cfg)
	if err != nil {
		return err
	}
	defer pool.Close()
	const columns = `select r.id::text, r.data, r.version, r.created_at, r.updated_at from `
	fixed := columns + pgx.Identifier{schema, "records"}.Sanitize() + ` r join ` + pgx.Identifier{schema, "pipelines"}.Sanitize() +
		` p on p.id = r.pipeline_id where p.key = $1 and r.id = $2 and r.deleted_at is null`
	const unqualified = columns + `records r join pipelines p on p.id = r.pipeline_id where p.key = $1 and r.id = $2 and r.deleted_at is null`
	// The floor has one tenant's records only: any id of that tenant serves.
	var any string
	if err := pool.QueryRow(context.Background(), `select id::text from `+pgx.Identifier{schema, "records"}.Sanitize()+` limit 1`).Scan(&any); err != nil {
		return err
	}
	r := gin.New()
	r.GET("/ready", func(c *gin.Context) { c.Status(http.StatusOK) })
	r.GET("/api/v1/pipelines/:pipeline/records/:id", func(c *gin.Context) {
		ctx := c.Request.Context()
		var rec record
		scan := func(row pgx.Row) error {
			return row.Scan(&rec.ID, &rec.Data, &rec.Version, &rec.CreatedAt, &rec.UpdatedAt)
		}
		var err error
		if mode == "floor" {
			err = scan(pool.QueryRow(ctx, fixed, c.Param("pipeline"), any))
		} else {
			slug, _, _ := strings.Cut(c.Request.Host, ".")
			err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				if _, err := tx.Exec(ctx, `set local search_path to `+pgx.Identifier{slug}.Sanitize()); err != nil {
					return err
				}
				return scan(tx.QueryRow(ctx, unqualified, c.Param("pipeline"), c.Param("id")))
			})
		}
		if err != nil {
			c.String(http.StatusInternalServerError, err.Error())
			return
		}
		c.JSON(http.StatusOK, rec)
	})
	return (&http.Server{Addr: addr, Handler: r, ReadHeaderTimeout: 5 * time.Second}).ListenAndServe()
}

// floor starts serveFloor. It logs in as the owner, who may read every tenant's tables.
func (in *installation) floor(mode string) func(context.Context) (*process, error) {
	return func(ctx context.Context) (*process, error) {
		addr, err := freeAddr()
		if err != nil {
			return nil, err
		}
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		cmd := exec.Command(self, "-floor", mode, "-floor-url", in.group.OwnerURL, "-floor-addr", addr, "-floor-schema", in.slugs[0])
		return start(ctx, cmd, addr, "http://"+addr+"/ready", filepath.Join(in.b.dir, mode+".log"))
	}
}
