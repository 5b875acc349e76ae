package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/spf13/viper"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// LoadOptions says where to look. The zero value looks nowhere.
type LoadOptions struct {
	// File must exist when it is given. Without it, the first of Dir/oneo.yaml, $XDG_CONFIG_HOME/oneo/config.yaml and
	// /etc/oneo/config.yaml is read, if there is one.
	File  string
	Dir   string
	Env   []string          // as os.Environ
	Flags map[string]string // by key: "server.addr"
}

// Origins says of each key where its value came from: "default", "file PATH", "environment NAME" or "flag".
type Origins map[string]string

// secrets are the keys that can be read from a file named by KEY_file, and are never printed.
var secrets = []string{"server.secret", "database.url", "database.owner_url", "database.direct_url", "redis.url"}

func secret(key string) bool {
	return slices.Contains(secrets, key) || strings.HasPrefix(key, "database.groups.")
}

// aliases are the plain names that platforms set. They rank just above the defaults.
var aliases = map[string]string{"DATABASE_URL": "database.url", "REDIS_URL": "redis.url", "PORT": "server.addr"}

// ignored are the names with our prefix that are not settings.
func ignored(name string) bool {
	return name == "ONEO_FAILPOINTS" || name == "ONEO_CONFIG" || strings.HasPrefix(name, "ONEO_TEST_") || name == "ONEO_UPDATE_GOLDEN"
}

// Keys lists the key of every setting, without those of groups.
func Keys() []string {
	var keys []string
	for k := range flatten(Default()) {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// EnvName is the environment's name of a key.
func EnvName(key string) string { return "ONEO_" + strings.ToUpper(strings.ReplaceAll(key, ".", "_")) }

// EnvNames lists every name that the environment may use, without those of groups.
func EnvNames() []string {
	var names []string
	for _, k := range Keys() {
		names = append(names, EnvName(k))
		if secret(k) {
			names = append(names, EnvName(k)+"_FILE")
		}
	}
	slices.Sort(names)
	return names
}

// flatten is a Config by dotted keys.
func flatten(c Config) map[string]any {
	out := map[string]any{}
	var walk func(prefix string, v reflect.Value)
	walk = func(prefix string, v reflect.Value) {
		for i := range v.NumField() {
			key := prefix + v.Type().Field(i).Tag.Get("mapstructure")
			f := v.Field(i)
			switch f.Kind() {
			case reflect.Struct:
				walk(key+".", f)
			case reflect.Map:
				for _, k := range f.MapKeys() {
					walk(key+"."+k.String()+".", f.MapIndex(k))
				}
			default:
				out[key] = f.Interface()
			}
		}
	}
	walk("", reflect.ValueOf(c))
	return out
}

// Load reads the configuration and validates it. The fault is Invalid and names the key.
func Load(o LoadOptions) (Config, Origins, error) {
	origins := Origins{}
	v := viper.New()
	for key, value := range flatten(Default()) {
		v.SetDefault(key, value)
		origins[key] = "default"
	}
	env := map[string]string{}
	for _, kv := range o.Env {
		name, value, _ := strings.Cut(kv, "=")
		env[name] = value
	}
	known := append(Keys(), groupKeys(env)...)
	for name, key := range aliases {
		if value := env[name]; value != "" {
			if name == "PORT" {
				value = ":" + value
			}
			v.SetDefault(key, value)
			origins[key] = "environment " + name
		}
	}
	if err := readFile(v, o, known, origins); err != nil {
		return Config{}, nil, err
	}
	if err := readEnv(v, env, known, origins); err != nil {
		return Config{}, nil, err
	}
	for key, value := range o.Flags {
		if !slices.Contains(known, key) {
			return Config{}, nil, unknownKey("setting", key, known)
		}
		v.Set(key, value)
		origins[key] = "flag"
	}
	var c Config
	hooks := mapstructure.ComposeDecodeHookFunc(sizeHook, durationHook, schedulesHook, mapstructure.StringToSliceHookFunc(","))
	if err := v.UnmarshalExact(&c, viper.DecodeHook(hooks)); err != nil {
		return Config{}, nil, fault.New(fault.Invalid, "the configuration cannot be read: %s", decodeMessage(err)).WithCode("setting")
	}
	if c.Database.Groups == nil {
		c.Database.Groups = map[string]Group{}
	}
	return c, origins, c.Validate()
}

// decodeMessage is mapstructure's text, which names keys and the forms of values, cut to its first lines.
func decodeMessage(err error) string {
	s := strings.Join(strings.Fields(err.Error()), " ")
	if len(s) > 300 {
		s = s[:300] + "..."
	}
	return s
}

func sizeHook(from, to reflect.Type, data any) (any, error) {
	if to != reflect.TypeFor[Size]() || from.Kind() != reflect.String {
		return data, nil
	}
	return ParseSize(data.(string))
}

func durationHook(from, to reflect.Type, data any) (any, error) {
	if to != reflect.TypeFor[time.Duration]() || from.Kind() != reflect.String {
		return data, nil
	}
	d, err := time.ParseDuration(data.(string))
	if err != nil {
		return nil, fmt.Errorf("%q is no duration; write for example 30s, 5m or 24h", data)
	}
	return d, nil
}

func readFile(v *viper.Viper, o LoadOptions, known []string, origins Origins) error {
	path, must := o.File, true
	if path == "" {
		path, must = findFile(o), false
	}
	if path == "" {
		return nil
	}
	f := viper.New()
	f.SetConfigFile(path)
	f.SetConfigType("yaml")
	if err := f.ReadInConfig(); err != nil {
		if errors.Is(err, fs.ErrNotExist) && must {
			return fault.New(fault.Invalid, "the configuration file %s does not exist", path).WithCode("no_config")
		}
		return fault.Wrap(err, fault.Invalid, "the configuration file %s cannot be read", path).WithCode("bad_config")
	}
	for _, key := range f.AllKeys() {
		plain := key
		if name := strings.TrimSuffix(key, "_file"); secret(name) { // others may end so as well
			plain = name
		}
		group := strings.HasPrefix(key, "database.groups.")
		switch {
		case slices.Contains(known, key), group && groupKey(plain):
		case plain != key:
		case key == "database.groups" || key == "schemas" || key == "redis":
			continue // an empty section
		default:
			return unknownKey("setting "+key+" in "+path+":", key, known)
		}
		value := f.Get(key)
		if plain != key {
			text, err := secretFile(fmt.Sprint(value), key)
			if err != nil {
				return err
			}
			value = text
		}
		v.Set(plain, value)
		origins[plain] = "file " + path
		if plain != key { // not there, but in a file of its own
			origins[plain] = "file " + fmt.Sprint(f.Get(key))
		}
	}
	return nil
}

func findFile(o LoadOptions) string {
	var home string
	for _, kv := range o.Env {
		if name, value, _ := strings.Cut(kv, "="); name == "XDG_CONFIG_HOME" {
			home = value
		} else if name == "HOME" && home == "" && value != "" {
			home = filepath.Join(value, ".config")
		}
	}
	var candidates []string
	if o.Dir != "" {
		candidates = append(candidates, filepath.Join(o.Dir, "oneo.yaml"))
		if home != "" {
			candidates = append(candidates, filepath.Join(home, "oneo", "config.yaml"))
		}
		candidates = append(candidates, "/etc/oneo/config.yaml")
	}
	for _, c := range candidates {
		if st, err := os.Stat(c); err == nil && st.Mode().IsRegular() {
			return c
		}
	}
	return ""
}

// groupKey reports whether a key names one of a group's URLs.
func groupKey(key string) bool {
	parts := strings.Split(key, ".")
	return len(parts) == 4 && groupForm.MatchString(parts[2]) && slices.Contains([]string{"url", "owner_url", "direct_url"}, parts[3])
}

// groupKeys are the keys of the groups that the environment names: ONEO_DATABASE_GROUPS_<NAME>_URL and so on.
func groupKeys(env map[string]string) []string {
	var keys []string
	for name := range env {
		rest, ok := strings.CutPrefix(strings.TrimSuffix(name, "_FILE"), "ONEO_DATABASE_GROUPS_")
		if !ok {
			continue
		}
		for _, suffix := range []string{"_OWNER_URL", "_DIRECT_URL", "_URL"} {
			if group, ok := strings.CutSuffix(rest, suffix); ok && groupForm.MatchString(strings.ToLower(group)) {
				keys = append(keys, "database.groups."+strings.ToLower(group)+"."+strings.ToLower(strings.TrimPrefix(suffix, "_")))
				break
			}
		}
	}
	return keys
}

func readEnv(v *viper.Viper, env map[string]string, known []string, origins Origins) error {
	byName := map[string]string{}
	for _, key := range known {
		byName[EnvName(key)] = key
	}
	names := make([]string, 0, len(env))
	for name := range env {
		if strings.HasPrefix(name, "ONEO_") && !ignored(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		value := env[name]
		key, ok := byName[name]
		if !ok {
			plain := strings.TrimSuffix(name, "_FILE")
			if key = byName[plain]; plain == name || key == "" || !secret(key) {
				all := make([]string, 0, len(byName))
				for n := range byName {
					all = append(all, n)
				}
				return unknownKey("environment variable", name, all)
			}
			text, err := secretFile(value, name)
			if err != nil {
				return err
			}
			value = text
		}
		v.Set(key, value)
		origins[key] = "environment " + name
	}
	return nil
}

func secretFile(path, name string) (string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return "", fault.Wrap(err, fault.Invalid, "the file that %s names cannot be read", name).WithCode("secret_file")
	}
	return strings.TrimRight(string(text), "\r\n"), nil
}

func unknownKey(what, key string, known []string) error {
	f := fault.New(fault.Invalid, "unknown %s %s", what, key).WithCode("unknown_setting")
	if strings.HasSuffix(what, ":") {
		f = fault.New(fault.Invalid, "unknown %s", strings.TrimSuffix(what, ":")).WithCode("unknown_setting")
	}
	if near := fault.Nearest(key, known, 1); len(near) > 0 {
		return f.WithHint("did you mean %s?", near[0])
	}
	return f.WithHint("`oneo config show` lists all settings")
}

// Setting is one line of the configuration as it may be shown.
type Setting struct {
	Key    string `json:"key"`
	Value  string `json:"value"`
	Origin string `json:"origin"`
}

// Settings lists every setting, by key, with secrets hidden.
func (c Config) Settings(origins Origins) []Setting {
	var out []Setting
	for key, value := range flatten(c) {
		s := Setting{Key: key, Origin: origins[key]}
		switch v := value.(type) {
		case string:
			s.Value = v
			if secret(key) {
				s.Value = redact(key, v)
			}
		case []string:
			s.Value = strings.Join(v, ",")
		case []Schedule:
			names := make([]string, len(v))
			for i := range v {
				names[i] = v[i].String()
			}
			s.Value = strings.Join(names, ", ")
		default:
			s.Value = fmt.Sprint(v)
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b Setting) int { return strings.Compare(a.Key, b.Key) })
	return out
}

// redact shows of a secret that it is set, and of a URL where it leads.
func redact(key, value string) string {
	switch {
	case value == "":
		return ""
	case strings.HasSuffix(key, "secret"):
		return "(set)"
	}
	return redactURL(value)
}
