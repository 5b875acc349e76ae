package tenant

import "log/slog"

var _, _, _ slog.LogValuer = Slug{}, Schema{}, Host{}

// LogValue is the name: without it a log in JSON would show an object without members.
func (s Slug) LogValue() slog.Value { return slog.StringValue(s.s) }

// LogValue is the name.
func (s Schema) LogValue() slog.Value { return slog.StringValue(s.s) }

// LogValue is the name.
func (h Host) LogValue() slog.Value { return slog.StringValue(h.s) }
