package config

import "net/url"

// redactURL shows where a connection URL leads: scheme, user, host and path. Everything else may hold a secret: the
// password, a query with password or sslpassword, and a connection string in another form altogether.
func redactURL(s string) string {
	u, err := url.Parse(s)
	if err != nil || u.Scheme == "" || u.Host == "" && u.Path == "" || u.Opaque != "" {
		return "(set)"
	}
	shown := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}
	if name := u.User.Username(); name != "" {
		shown.User = url.User(name)
	}
	return shown.String()
}
