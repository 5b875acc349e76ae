package tenant

import (
	"context"
	"sync/atomic"
)

// About says for which request and for whom work is done: log lines and traces read it from the context. It decides nothing.
// It is safe for concurrent use.
type About struct {
	Request string // its id
	slug    atomic.Pointer[Slug]
}

// For notes whose work it is, once that is known.
func (a *About) For(s Slug) { a.slug.Store(&s) }

// Tenant is the name of whose work it is; empty: nobody's, or it is not known yet.
func (a *About) Tenant() string {
	if s := a.slug.Load(); s != nil {
		return s.s
	}
	return ""
}

type aboutKey struct{}

// WithAbout is a context that carries a.
func WithAbout(ctx context.Context, a *About) context.Context {
	return context.WithValue(ctx, aboutKey{}, a)
}

// AboutOf is what the context carries; nil: nothing.
func AboutOf(ctx context.Context) *About {
	a, _ := ctx.Value(aboutKey{}).(*About)
	return a
}
