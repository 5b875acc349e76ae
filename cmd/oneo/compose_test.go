package main_test

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/config"
)

// composeFile is what of docker-compose.yml has to agree with the rest. YAML's merge keys are resolved.
type composeFile struct {
	Services map[string]struct {
		Image       string
		Build       string
		Command     []string
		Environment map[string]string
		Ports       []string
		Volumes     []string
		User        string
		Healthcheck struct {
			Test    []string
			Disable bool
		}
		DependsOn map[string]struct{ Condition string } `yaml:"depends_on"`
	}
	Volumes map[string]any
}

func repositoryFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("../../" + name)
	require.NoError(t, err)
	return string(text)
}

func readCompose(t *testing.T) composeFile {
	t.Helper()
	var c composeFile
	require.NoError(t, yaml.Unmarshal([]byte(repositoryFile(t, "docker-compose.yml")), &c))
	return c
}

var (
	interpolation = regexp.MustCompile(`\$\{(\w+)(?::-([^}]*))?\}`)
	ourName       = regexp.MustCompile(`\bONEO_[A-Z_]+`)
)

// interpolated is a value as it is where nothing is set, and what stands in the file without a default.
func interpolated(s string) (value string, unset []string) {
	value = interpolation.ReplaceAllStringFunc(s, func(m string) string {
		parts := interpolation.FindStringSubmatch(m)
		if parts[2] == "" {
			unset = append(unset, parts[1])
		}
		return parts[2]
	})
	return value, unset
}

// A name that oneo does not know makes it refuse to start, also one that .env or a shell sets for compose alone.
func TestContainerFilesNameOnlySettingsThatExist(t *testing.T) {
	for _, file := range []string{"docker-compose.yml", "Dockerfile"} {
		names := ourName.FindAllString(repositoryFile(t, file), -1)
		require.NotEmpty(t, names, file)
		for _, name := range names {
			require.Contains(t, config.EnvNames(), name, "%s names a setting that oneo would refuse", file)
		}
	}
}

// What compose gives oneo where nothing is set is a configuration that oneo accepts, and one that fits its neighbours.
func TestComposeGivesAValidConfiguration(t *testing.T) {
	c := readCompose(t)
	for name, s := range c.Services {
		if s.Build == "" {
			continue
		}
		var env []string
		for key, value := range s.Environment {
			value, unset := interpolated(value)
			require.Empty(t, unset, "%s: %s must have a default, so that the file runs as it is", name, key)
			env = append(env, key+"="+value)
		}
		cfg, _, err := config.Load(config.LoadOptions{Env: env})
		require.NoError(t, err, "the environment of %s", name)
		require.GreaterOrEqual(t, len(cfg.Server.Secret), config.MinSecretBytes, name)
		require.Contains(t, cfg.Database.URL, "://"+cfg.Database.Roles.App+":", "%s serves as the app role", name)
		require.Contains(t, cfg.Database.OwnerURL, "://"+cfg.Database.Roles.Owner+":", "%s provisions as the owner", name)
		require.Contains(t, cfg.Database.URL, "@postgres:5432/", "%s reaches the service postgres", name)
		require.Contains(t, cfg.Redis.URL, "@redis:6379/", "%s reaches the service redis", name)
		require.NotContains(t, cfg.Database.URL+cfg.Database.OwnerURL, "//postgres:", "%s does not serve as a superuser", name)

		command, unset := interpolated(strings.Join(s.Command, " "))
		require.Empty(t, unset, name)
		admin, _ := interpolated(c.Services["postgres"].Environment["POSTGRES_PASSWORD"])
		if strings.Contains(command, "--admin-url") {
			require.Contains(t, command, "postgres://postgres:"+admin+"@postgres:5432/", "init logs in as compose's administrator")
		}
		redis, _ := interpolated(strings.Join(c.Services["redis"].Command, " "))
		_, password, _ := strings.Cut(redis, "--user oneo on >")
		password, _, _ = strings.Cut(password, " ")
		require.Contains(t, cfg.Redis.URL, "//oneo:"+password+"@", "%s has Redis's user", name)
	}
}

func TestComposeStartsInOrder(t *testing.T) {
	c := readCompose(t)
	require.Equal(t, []string{"init"}, c.Services["init"].Command[:1])
	require.Equal(t, []string{"migrate", "--shared"}, c.Services["migrate"].Command)
	require.Equal(t, []string{"serve"}, c.Services["oneo"].Command)
	for _, wait := range [][3]string{
		{"init", "postgres", "service_healthy"}, {"migrate", "init", "service_completed_successfully"},
		{"oneo", "migrate", "service_completed_successfully"}, {"oneo", "redis", "service_healthy"},
	} {
		require.Equal(t, wait[2], c.Services[wait[0]].DependsOn[wait[1]].Condition, "%s waits for %s", wait[0], wait[1])
	}
	for name, s := range c.Services {
		for other := range s.DependsOn {
			require.Contains(t, c.Services, other, "%s waits for a service that is not there", name)
		}
		if s.Build == "" {
			require.NotEmpty(t, s.Healthcheck.Test, "%s is waited for until it is healthy", name)
		}
	}
}

// Security 36: compose's Redis lets in one user, who may do what oneo does and nothing that reaches further.
func TestComposeRedisLetsOneoDoItsWork(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := l.Addr().String()
	require.NoError(t, l.Close())
	_, port, _ := net.SplitHostPort(addr)
	var args []string
	for _, a := range readCompose(t).Services["redis"].Command[2:] {
		a, _ = interpolated(a)
		args = append(args, a)
	}
	conf := filepath.Join(t.TempDir(), "redis.conf")
	here := strings.Replace(repositoryFile(t, "config/redis.conf"), "dir /data", "dir "+filepath.Dir(conf), 1)
	require.NoError(t, os.WriteFile(conf, []byte(here), 0o600))
	args = append([]string{conf, "--port", port, "--bind", "127.0.0.1"}, args...)
	cmd := exec.CommandContext(t.Context(), "redis-server", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })

	url, _ := interpolated(readCompose(t).Services["oneo"].Environment["ONEO_REDIS_URL"])
	url = strings.Replace(url, "redis:6379", addr, 1)
	c, err := cache.Open(cache.Options{URL: url, Timeout: time.Minute})
	require.NoError(t, err)
	defer c.Close()
	require.Eventually(t, func() bool { return c.Ping(t.Context()) == nil }, time.Minute, 20*time.Millisecond, "Redis does not start, or does not let oneo in")
	heard := make(chan string, 1)
	c.OnMessage(func(m cache.Message) { heard <- m.Value })
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	go c.Listen(ctx, func() {})
	key, err := cache.PublicKey("kind", "id")
	require.NoError(t, err)
	require.NoError(t, c.Set(ctx, key, []byte("value"), time.Minute))
	value, found := c.Get(ctx, key)
	require.True(t, found)
	require.Equal(t, "value", string(value))
	c.Add(ctx, key, []byte("other"), time.Now(), time.Minute)
	rate, err := cache.PublicKey("rate", "id")
	require.NoError(t, err)
	require.True(t, c.Allow(ctx, rate, cache.Limit{Count: 1, Per: time.Hour}).Allowed)
	require.False(t, c.Allow(ctx, rate, cache.Limit{Count: 1, Per: time.Hour}).Allowed)

	o, err := goredis.ParseURL(url)
	require.NoError(t, err)
	o.MaxRetries = -1
	client := goredis.NewClient(o)
	defer client.Close()
	require.Eventually(t, func() bool { // whom the listener's subscription reaches, its own process does not need
		return client.Publish(ctx, "oneo:invalidate", "kind other").Val() == 1
	}, time.Minute, 20*time.Millisecond, "the listener may not subscribe")
	require.Equal(t, "other", <-heard)
	for _, command := range []string{"flushall", "flushdb", "keys *", "config get *", "scan 0", "monitor", "shutdown", "acl list", "script flush", "del " + key.String(), "subscribe elsewhere", "replicaof no one"} {
		var words []any
		for _, w := range strings.Fields(command) {
			words = append(words, w)
		}
		require.ErrorContains(t, client.Do(ctx, words...).Err(), "NOPERM", command)
	}
	o.Username, o.Password = "default", "redis-password-for-a-try"
	other := goredis.NewClient(o)
	defer other.Close()
	require.Error(t, other.Ping(ctx).Err(), "the user that everybody knows is off")
}

func TestComposeKeepsItsData(t *testing.T) {
	c := readCompose(t)
	require.Contains(t, c.Services["postgres"].Volumes, "postgres:/var/lib/postgresql/data")
	require.Contains(t, c.Services["redis"].Volumes, "redis:/data")
	require.Contains(t, c.Volumes, "postgres")
	require.Contains(t, c.Volumes, "redis")

	// Redis's own settings come from a file of this repository: the one that keeps both snapshots and the log.
	redis := c.Services["redis"]
	require.Equal(t, []string{"redis-server", "/etc/redis/redis.conf"}, redis.Command[:2])
	require.Contains(t, redis.Volumes, "./config/redis.conf:/etc/redis/redis.conf:ro")
	conf := repositoryFile(t, "config/redis.conf")
	for _, line := range []string{`dir /data`, `save \d.*`, `appendonly yes`, `appendfsync everysec`, `aof-use-rdb-preamble yes`,
		`stop-writes-on-bgsave-error no`, `maxmemory-policy allkeys-lru`} {
		require.Regexp(t, `(?m)^`+line+`$`, conf, "config/redis.conf")
	}
}

// The image, compose and the defaults agree on ports, user and health check.
func TestImageAgreesWithComposeAndDefaults(t *testing.T) {
	image := repositoryFile(t, "Dockerfile")
	instruction := func(name string) string {
		found := regexp.MustCompile(`(?m)^`+name+` (.*)$`).FindAllStringSubmatch(image, -1)
		require.NotEmpty(t, found, "the image has no %s", name)
		return found[len(found)-1][1]
	}
	cfg, _, err := config.Load(config.LoadOptions{Env: strings.Fields(instruction("ENV"))})
	require.NoError(t, err, "the image's environment")
	def := config.Default()
	require.Equal(t, def.Server.Addr, cfg.Server.Addr)
	require.Equal(t, def.Server.OpsAddr, cfg.Server.OpsAddr)

	require.Equal(t, cfg.Server.Addr, ":"+instruction("EXPOSE"))
	require.Contains(t, instruction("HEALTHCHECK"), `"http://`+cfg.Server.OpsAddr+`/readyz"`)
	require.Regexp(t, `^[1-9]\d*:[1-9]\d*$`, instruction("USER"), "a number that is not root's")
	require.Equal(t, `["/usr/local/bin/oneo"]`, instruction("ENTRYPOINT"), "a signal must reach oneo, not a shell")
	require.Contains(t, image, "CGO_ENABLED=0", "the binary is static")

	mod := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(repositoryFile(t, "go.mod"))
	require.Contains(t, image, "FROM golang:"+mod[1]+"-", "the image is built with go.mod's Go")

	c := readCompose(t)
	oneo := c.Services["oneo"]
	require.Len(t, oneo.Ports, 1, "the operators' port stays inside")
	require.True(t, strings.HasSuffix(oneo.Ports[0], ":8000"+cfg.Server.Addr), "published: %s", oneo.Ports[0])
	require.True(t, strings.HasPrefix(oneo.Ports[0], "127.0.0.1:"), "secrets that everybody knows are for this machine alone")
	require.False(t, oneo.Healthcheck.Disable, "serve is checked by the image's health check")
	for name, s := range c.Services {
		require.Empty(t, s.User, "%s runs as its image's user", name)
		if name != "oneo" {
			require.Empty(t, s.Ports, "%s is not published", name)
		}
		if s.Build != "" {
			require.Equal(t, oneo.Image, s.Image, "%s runs the same image", name)
		}
	}

	// What is not sent to the builder must not be needed by it.
	ignored := strings.Fields(repositoryFile(t, ".dockerignore"))
	for _, needed := range []string{"cmd", "pkg", "schemas", "go.mod", "go.sum"} {
		require.False(t, slices.Contains(ignored, needed), ".dockerignore leaves out %s", needed)
	}
}
