package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	// lockTimeout is oneo's default.
	lockTimeout = time.Second
	// requestTime is what a reader may wait beyond it: to be sent, queued and answered on a machine that is at work.
	requestTime = 100 * time.Millisecond

	busyRate   = 10  // requests a second of the busy tenant
	othersRate = 200 // and of all others together
)

// blocked holds one tenant with a transaction that has read its records, while a run adds a column to all of them and
// others go on reading.
func (f *fleet) blocked(ctx context.Context) error {
	if len(f.slugs) < 2 {
		return fmt.Errorf("it takes two tenants")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	// The default number of connections: what waits for a lock holds one.
	p, err := f.serve(ctx, "ONEO_DATABASE_MAX_CONNS=32")
	if err != nil {
		return err
	}
	defer p.stop()
	busy := len(f.slugs) / 2
	beside, others, err := f.besideOf(ctx, busy)
	if err != nil {
		return err
	}
	quiet := func(tenants []int, perSecond float64) []answer {
		ctx, cancel := context.WithTimeout(ctx, max(3*time.Second, f.b.duration/2))
		defer cancel()
		return f.pace(ctx, p, perSecond, tenants)
	}
	quiet(slices.Concat(others, beside), othersRate) // so that no backend meets a tenant for the first time later
	before := quiet([]int{busy}, busyRate)

	var during []answer
	var story blockedStory
	err = f.asSuperuser(ctx, func(c *pgx.Conn) error {
		if _, err := c.Exec(ctx, "begin; select count(*) from "+pgx.Identifier{f.slugs[busy], "records"}.Sanitize()); err != nil {
			return err
		}
		column, err := f.addMigration()
		if err != nil {
			return err
		}
		reading, stop := context.WithCancel(ctx)
		defer stop()
		var readers sync.WaitGroup
		var ofBusy, ofOthers []answer
		readers.Go(func() { ofBusy = f.pace(reading, p, busyRate, []int{busy}) })
		readers.Go(func() { ofOthers = f.pace(reading, p, othersRate, shuffled(slices.Concat(others, beside))) })
		story, err = f.runBeside(ctx, f.slugs[busy], func() error {
			_, err := c.Exec(ctx, "rollback")
			stop() // what is asked from here on waits for nobody
			return err
		})
		stop()
		readers.Wait()
		during = append(ofBusy, ofOthers...)
		if err != nil {
			return err
		}
		return f.added(ctx, column)
	})
	if err != nil {
		return err
	}

	f.b.printf("### One of %d tenants is held by a long reader\n", len(f.slugs))
	f.b.printf("A transaction has read its `records` and stays open; `oneo migrate --all-tenants --jobs %d` adds a column to all, and `oneo serve` is read: the held tenant %d times a second, all others together %d times. Waits are measured from the time at which a request was due.\n",
		f.jobs, busyRate, othersRate)
	f.b.printf("| readers | requests | p50 ms | p99 ms | longest ms | other than 200 |\n| --- | --- | --- | --- | --- | --- |")
	row := func(who string, all []answer) traffic {
		t := summary(all, time.Second)
		f.b.printf("| %s | %d | %.1f | %.1f | **%.0f** | %s |", who, len(all), ms(t.p50), ms(t.p99), ms(t.max), told(t.failures))
		return t
	}
	of := func(tenants []int) []answer {
		is := map[int]bool{}
		for _, i := range tenants {
			is[i] = true
		}
		return slices.DeleteFunc(slices.Clone(during), func(a answer) bool { return !is[a.tenant] })
	}
	row("of the held tenant, no run", before)
	held := row("of the held tenant, a run", of([]int{busy}))
	row("of tenants that share its login, a run", of(beside))
	row("of all other tenants, a run", of(others))
	f.b.printf("\nThe other %d tenants were done after %.1f s; the held one was set aside %d times within %.1f s, and was done %.1f s after its reader had ended.\n",
		len(f.slugs)-1, story.others.Seconds(), story.aside, story.held.Seconds(), story.after.Seconds())
	f.b.goal(held.max <= lockTimeout+requestTime, fmt.Sprintf("a reader of the held tenant waits at most lock_timeout (%s) and a request's time (%s)", lockTimeout, requestTime),
		fmt.Sprintf("%.0f ms; refused meanwhile: %s", ms(held.max), told(held.failures)))
	f.b.goal(story.aside > 0 && story.others < story.held, "the others are finished meanwhile, the held one is set aside and done later",
		fmt.Sprintf("after %.1f s of %.1f s", story.others.Seconds(), story.held.Seconds()))
	return nil
}

// blockedStory is what a run told whose one tenant was held.
type blockedStory struct {
	others time.Duration // until the others were done
	aside  int           // how often the held one was set aside, while it was held
	held   time.Duration // for how long it was held, from the run's start
	after  time.Duration // from there until it was done
}

// runBeside starts a run, lets go of the held tenant once all others are done and it was set aside twice, or after a
// minute, and waits for the run's end.
func (f *fleet) runBeside(ctx context.Context, held string, letGo func() error) (s blockedStory, err error) {
	cmd := f.migrate(ctx, f.jobs, "--progress", "json")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return s, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return s, err
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for scan := bufio.NewScanner(stderr); scan.Scan(); {
			lines <- scan.Text()
		}
	}()
	patience := time.NewTimer(time.Minute)
	defer patience.Stop()
	release := func() error {
		s.held = time.Since(start)
		return letGo()
	}
	var said []string
	var letErr error
	left := len(f.slugs) - 1
	for open := true; open; {
		select {
		case <-patience.C:
			if s.held == 0 {
				letErr = release()
			}
		case line, more := <-lines:
			if open = more; !open {
				break
			}
			said = append(said, line)
			var event struct{ Event, Tenant, Status string }
			if json.Unmarshal([]byte(line), &event) != nil {
				continue
			}
			switch {
			case event.Event == "busy" && event.Tenant == held && s.held == 0:
				s.aside++
			case event.Event == "tenant" && event.Tenant == held:
				s.after = time.Since(start) - s.held
			case event.Event == "tenant" && event.Status == "ok":
				if left--; left == 0 {
					s.others = time.Since(start)
				}
			}
			if left == 0 && s.aside >= 2 && s.held == 0 {
				letErr = release()
			}
		}
	}
	if s.held == 0 { // the run is over, and gave it up
		letErr = release()
	}
	if err := cmd.Wait(); err != nil {
		return s, fmt.Errorf("migrate: %w: %s", err, tail([]byte(strings.Join(said, "\n"))))
	}
	if left != 0 {
		return s, fmt.Errorf("the run told of all but %d tenants", left)
	}
	return s, letErr
}

// besideOf splits the other tenants into those that share a tenant's login, and with it its connections, and the rest.
func (f *fleet) besideOf(ctx context.Context, tenant int) (beside, rest []int, err error) {
	numbers := map[string]int{}
	err = f.asSuperuser(ctx, func(c *pgx.Conn) error {
		rows, err := c.Query(ctx, `select slug, number from public.tenants`)
		if err != nil {
			return err
		}
		var slug string
		var number int
		_, err = pgx.ForEachRow(rows, []any{&slug, &number}, func() error { numbers[slug] = number; return nil })
		return err
	})
	for i, slug := range f.slugs {
		switch {
		case i == tenant:
		case numbers[slug]%f.logins == numbers[f.slugs[tenant]]%f.logins:
			beside = append(beside, i)
		default:
			rest = append(rest, i)
		}
	}
	return beside, rest, err
}
