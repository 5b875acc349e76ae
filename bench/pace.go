package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"
)

// answer is one request of a steady reader: how long after it was due it was answered.
type answer struct {
	tenant int
	took   time.Duration
	status string // empty: 200
}

// everyone are all tenants by their index.
func everyone(n int) []int {
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	return all
}

// shuffled are the same tenants in another order.
func shuffled(tenants []int) []int {
	all := slices.Clone(tenants)
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// pace reads records of tenants in turn, at a steady rate until ctx ends. A request is sent when it is due, answered ones
// or not: waiting readers do not make the others arrive later.
func (in *installation) pace(ctx context.Context, p *process, perSecond float64, tenants []int) []answer {
	return in.paceAs(ctx, p, perSecond, tenants, func(tenant int) string { return token(in.slugs[tenant]) })
}

// paceAs is pace with other tokens than those of sessions.
func (in *installation) paceAs(ctx context.Context, p *process, perSecond float64, tenants []int, tokenOf func(tenant int) string) []answer {
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 1000, DisableCompression: true}}
	defer client.CloseIdleConnections()
	var mu sync.Mutex
	var all []answer
	var asking sync.WaitGroup
	start := time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for k := 0; ; k++ {
		due := start.Add(time.Duration(float64(k) / perSecond * float64(time.Second)))
		timer.Reset(time.Until(due))
		select {
		case <-ctx.Done():
			asking.Wait()
			return all
		case <-timer.C:
		}
		tenant := tenants[k%len(tenants)]
		asking.Go(func() {
			status := in.ask(client, p, tenant, tokenOf(tenant))
			took := time.Since(due)
			mu.Lock()
			defer mu.Unlock()
			all = append(all, answer{tenant, took, status})
		})
	}
}

// ask reads one record of a tenant and says what the answer was if it was not 200.
func (in *installation) ask(client *http.Client, p *process, tenant int, token string) string {
	ids := in.records[tenant]
	req, err := http.NewRequest(http.MethodGet, "http://"+p.addr+recordPath(ids[rand.IntN(len(ids))]), nil)
	if err != nil {
		return err.Error()
	}
	req.Host = in.slugs[tenant] + ".localhost"
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := client.Do(req)
	if err != nil {
		return "no answer"
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return "no answer"
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Sprint(res.StatusCode)
	}
	return ""
}

// summary of what steady readers saw within d.
func summary(all []answer, d time.Duration) traffic {
	t := traffic{perSecond: float64(len(all)) / d.Seconds(), failures: map[string]int{}}
	if len(all) == 0 {
		return t
	}
	took := make([]time.Duration, len(all))
	for i, a := range all {
		took[i] = a.took
		if a.status != "" {
			t.failures[a.status]++
		}
	}
	slices.Sort(took)
	at := func(q float64) time.Duration { return took[min(len(took)-1, int(q*float64(len(took))))] }
	t.p50, t.p99, t.max = at(0.5), at(0.99), took[len(took)-1]
	return t
}
