package config_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
)

func load(t *testing.T, o config.LoadOptions) config.Config {
	t.Helper()
	c, _, err := config.Load(o)
	require.NoError(t, err)
	return c
}

func file(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "oneo.yaml")
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func TestDocumentedFileIsTheDefault(t *testing.T) {
	require.Equal(t, config.Default(), load(t, config.LoadOptions{}))
	require.Equal(t, config.Default(), load(t, config.LoadOptions{File: "../../config/oneo.yaml"}))

	text, err := os.ReadFile("../../config/oneo.yaml")
	require.NoError(t, err)
	var tree map[string]any
	require.NoError(t, yaml.Unmarshal(text, &tree))
	var keys []string
	var walk func(prefix string, m map[string]any)
	walk = func(prefix string, m map[string]any) {
		for k, v := range m {
			if inner, ok := v.(map[string]any); ok {
				walk(prefix+k+".", inner)
			} else {
				keys = append(keys, prefix+k)
			}
		}
	}
	walk("", tree)
	slices.Sort(keys)
	require.Equal(t, config.Keys(), keys, "config/oneo.yaml must name every setting, and no other")
	lines := strings.Split(string(text), "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, "  ") && !strings.HasPrefix(strings.TrimSpace(l), "#") && !strings.HasPrefix(l, "    ") {
			require.Truef(t, strings.HasPrefix(strings.TrimSpace(lines[i-1]), "#"), "line %d of config/oneo.yaml has no comment: %s", i+1, l)
		}
	}
}

func TestPrecedence(t *testing.T) {
	f := file(t, "server:\n  addr: from-file:1\n")
	env := []string{"PORT=7", "ONEO_SERVER_ADDR=from-env:1"}
	flag := map[string]string{"server.addr": "from-flag:1"}
	require.Equal(t, ":8000", load(t, config.LoadOptions{}).Server.Addr)
	require.Equal(t, ":7", load(t, config.LoadOptions{Env: env[:1]}).Server.Addr)
	require.Equal(t, "from-file:1", load(t, config.LoadOptions{Env: env[:1], File: f}).Server.Addr)
	require.Equal(t, "from-env:1", load(t, config.LoadOptions{Env: env, File: f}).Server.Addr)
	require.Equal(t, "from-flag:1", load(t, config.LoadOptions{Env: env, File: f, Flags: flag}).Server.Addr)

	_, origins, err := config.Load(config.LoadOptions{Env: env, File: f})
	require.NoError(t, err)
	require.Equal(t, "environment ONEO_SERVER_ADDR", origins["server.addr"])
	require.Equal(t, "default", origins["server.ops_addr"])
}

func TestUnknownSettingsAreErrorsWithTheNearestName(t *testing.T) {
	for _, o := range []config.LoadOptions{
		{File: file(t, "server:\n  adr: x\n")},
		{Env: []string{"ONEO_SERVER_ADR=x"}},
		{Flags: map[string]string{"server.adr": "x"}},
	} {
		_, _, err := config.Load(o)
		require.True(t, fault.Is(err, fault.Invalid), "%v", err)
		require.Contains(t, strings.ToLower(strings.ReplaceAll(fault.Of(err).Hint, "_", ".")), "server.addr")
	}
	_, _, err := config.Load(config.LoadOptions{Env: []string{"ONEO_FAILPOINTS=x", "ONEO_TEST_ANYTHING=1", "OTHER=1"}})
	require.NoError(t, err)
}

func TestInvalidValuesNameTheirKeys(t *testing.T) {
	for key, value := range map[string]string{
		"database.statements": "maybe", "database.max_conns": "0", "database.lock_timeout": "0s", "tenancy.isolation": "none",
		"tenancy.logins": "65", "server.secret": "short", "server.public_url": "ftp://x", "server.max_body": "1B",
		"server.trusted_proxies": "10.0.0.1", "redis.url": "http://x", "log.level": "loud",
		"backup.physical.engine": "wal-g", "backup.physical.dir": "physical", "backup.physical.scratch": "./scratch", "backup.physical.config": "x.conf",
		"backup.physical.stanza": "a b",
	} {
		_, _, err := config.Load(config.LoadOptions{Flags: map[string]string{key: value}})
		require.Truef(t, fault.Is(err, fault.Invalid), "%s=%s: %v", key, value, err)
		require.Contains(t, fault.Of(err).Message, key)
	}
	for key, value := range map[string]string{"database.lock_timeout": "soon", "server.max_body": "much", "database.max_conns": "x"} {
		_, _, err := config.Load(config.LoadOptions{Flags: map[string]string{key: value}})
		require.Truef(t, fault.Is(err, fault.Invalid), "%s=%s: %v", key, value, err)
	}
}

func TestAnEngineOfPhysicalBackupsNeedsAFolder(t *testing.T) {
	for _, engine := range []string{"files", "pgbackrest"} {
		flags := map[string]string{"backup.physical.engine": engine}
		_, _, err := config.Load(config.LoadOptions{Flags: flags})
		require.Truef(t, fault.Is(err, fault.Invalid), "%s: %v", engine, err)
		require.Contains(t, fault.Of(err).Message, "backup.physical.dir")
		flags["backup.physical.dir"] = "/var/lib/oneo/physical"
		require.Equal(t, config.Physical{Engine: engine, Dir: "/var/lib/oneo/physical"}, load(t, config.LoadOptions{Flags: flags}).Backup.Physical)
	}
}

// Each time is good by itself; together they would keep a bar from outliving what it bars, or a session from being used.
func TestTheTimesOfTheCacheAreHeldAgainstEachOther(t *testing.T) {
	for _, c := range []struct {
		flags map[string]string
		names []string // of the settings that the error names; none: it is good
	}{
		{map[string]string{"cache.local_ttl": "30s"}, nil},
		{map[string]string{"cache.local_ttl": "31s"}, []string{"cache.local_ttl", "cache.shared_ttl"}},
		{map[string]string{"cache.shared_ttl": "1s"}, []string{"cache.local_ttl", "cache.shared_ttl"}},
		{map[string]string{"auth.session_idle": "1m"}, nil},
		{map[string]string{"auth.session_idle": "59s"}, []string{"cache.shared_ttl", "auth.session_idle"}},
		{map[string]string{"cache.shared_ttl": "12h1s"}, []string{"cache.shared_ttl", "auth.session_idle"}},
		{map[string]string{"auth.session_idle": "720h", "cache.shared_ttl": "23h59m30s"}, nil},
		{map[string]string{"auth.session_idle": "720h", "cache.shared_ttl": "23h59m31s"}, []string{"cache.shared_ttl", "server.request_timeout"}},
		{map[string]string{"auth.session_idle": "72h", "server.request_timeout": "24h"}, []string{"cache.shared_ttl", "server.request_timeout"}},
		{map[string]string{"cache.shared_ttl": "0s"}, []string{"cache.shared_ttl: must be above 0"}},
	} {
		_, _, err := config.Load(config.LoadOptions{Flags: c.flags})
		if c.names == nil {
			require.NoErrorf(t, err, "%v", c.flags)
			continue
		}
		require.Truef(t, fault.Is(err, fault.Invalid), "%v: %v", c.flags, err)
		for _, name := range c.names {
			require.Containsf(t, fault.Of(err).Message, name, "%v", c.flags)
		}
	}
	// The most that is kept in Redis is the room of the cache's to say.
	_, _, err := config.Load(config.LoadOptions{Flags: map[string]string{"auth.session_idle": "720h", "cache.shared_ttl": "24h"}})
	require.ErrorContains(t, err, cache.MaxTTL.String())
}

func TestSecretsFromFiles(t *testing.T) {
	secret := strings.Repeat("s", 40)
	path := file(t, secret+"\n")
	require.Equal(t, secret, load(t, config.LoadOptions{Env: []string{"ONEO_SERVER_SECRET_FILE=" + path}}).Server.Secret)
	require.Equal(t, secret, load(t, config.LoadOptions{File: file(t, "server:\n  secret_file: "+path+"\n")}).Server.Secret)
	_, _, err := config.Load(config.LoadOptions{Env: []string{"ONEO_SERVER_SECRET_FILE=/nowhere"}})
	require.ErrorContains(t, err, "ONEO_SERVER_SECRET_FILE")
	_, _, err = config.Load(config.LoadOptions{Env: []string{"ONEO_SERVER_ADDR_FILE=" + path}})
	require.Error(t, err, "only secrets are read from files")
}

func TestGroups(t *testing.T) {
	c := load(t, config.LoadOptions{
		File: file(t, "database:\n  url: postgres://a/main\n  groups:\n    eu:\n      url: postgres://a/eu\n"),
		Env:  []string{"ONEO_DATABASE_GROUPS_US_URL=postgres://a/us", "ONEO_DATABASE_GROUPS_US_OWNER_URL=postgres://o/us"},
	})
	all := c.AllGroups()
	require.Equal(t, "postgres://a/main", all["main"].DirectURL, "one URL serves for all three")
	require.Equal(t, "postgres://a/eu", all["eu"].OwnerURL)
	require.Equal(t, "postgres://o/us", all["us"].DirectURL)
	_, _, err := config.Load(config.LoadOptions{Env: []string{"ONEO_DATABASE_GROUPS_US_OWNER_URL=postgres://o/us"}})
	require.ErrorContains(t, err, "database.groups.us.url")
}

func TestNothingPrintedHoldsASecret(t *testing.T) {
	const word = "hunter2hunter2hunter2hunter2hunter2"
	c, origins, err := config.Load(config.LoadOptions{Env: []string{
		"ONEO_DATABASE_URL=postgres://app:" + word + "@db:5432/oneo?sslpassword=" + word,
		"ONEO_DATABASE_OWNER_URL=host=db user=o password=" + word + " dbname=x",
		"ONEO_DATABASE_GROUPS_EU_URL=postgres://app:" + word + "@eu/oneo",
		"ONEO_REDIS_URL=redis://:" + word + "@redis:6379/0", "ONEO_SERVER_SECRET=" + word,
	}})
	require.NoError(t, err)
	shown := fmt.Sprint(c.Settings(origins))
	require.NotContains(t, shown, word)
	require.Contains(t, shown, "postgres://app@db:5432/oneo")
	_, _, err = config.Load(config.LoadOptions{Env: []string{"ONEO_REDIS_URL=http://:" + word + "@x"}})
	require.Error(t, err)
	require.NotContains(t, fmt.Sprintf("%v %+v", err, fault.Of(err)), word)
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]config.Size{"0": 0, "12": 12, "3B": 3, "4KB": 4096, "512 MB": 512 << 20, "2GB": 2 << 30} {
		got, err := config.ParseSize(text)
		require.NoError(t, err)
		require.Equal(t, want, got, text)
		again, err := config.ParseSize(got.String())
		require.NoError(t, err)
		require.Equal(t, got, again)
	}
	for _, text := range []string{"", "-1", "1.5MB", "1TB", "99999999999GB"} {
		_, err := config.ParseSize(text)
		require.Error(t, err, text)
	}
}
