package store_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/store"
)

// part is the size of parts in these tests, in bytes.
const part = 64 << 10

// Tests do not wait between tries.
func init() { minio.DefaultRetryUnit = time.Millisecond }

var keys = []string{"AWS_ACCESS_KEY_ID=id", "AWS_SECRET_ACCESS_KEY=a secret that nobody may see"}

// service speaks S3's protocol, and fails as it is told.
type service struct {
	url string
	// meddle sees each request first, and says whether it has answered it.
	meddle atomic.Pointer[func(w http.ResponseWriter, r *http.Request) bool]
	inner  http.Handler
	past   atomic.Int64 // how old, in time.Duration, uploads are said to be that are begun now
}

// Now and Since are the clock of the service.
func (s *service) Now() time.Time                                       { return time.Now().UTC().Add(-time.Duration(s.past.Load())) }
func (s *service) Since(t time.Time) time.Duration                      { return s.Now().Sub(t) }
func (s *service) fail(f func(http.ResponseWriter, *http.Request) bool) { s.meddle.Store(&f) }
func (s *service) heal()                                                { s.meddle.Store(nil) }

func newService(t *testing.T) *service {
	t.Helper()
	backend := s3mem.New()
	require.NoError(t, backend.CreateBucket("bucket"))
	s := &service{}
	s.inner = gofakes3.New(backend, gofakes3.WithLogger(gofakes3.DiscardLog()), gofakes3.WithTimeSource(s), gofakes3.WithTimeSkewLimit(0)).Server()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f := s.meddle.Load(); f != nil && (*f)(w, r) {
			return
		}
		s.serve(w, r)
	}))
	t.Cleanup(server.Close)
	s.url = server.URL
	return s
}

// serve answers as S3 does where the one below does not.
func (s *service) serve(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	switch {
	case r.Method == http.MethodPut:
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		if sum := sha256.Sum256(body); hex.EncodeToString(sum[:]) != r.Header.Get("X-Amz-Content-Sha256") {
			refuse(w, http.StatusBadRequest, "XAmzContentSHA256Mismatch")
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
	case q.Has("list-type"): // short pages
		q.Set("max-keys", "2")
	case r.Method == http.MethodGet && q.Has("uploads"):
		list := httptest.NewRecorder()
		s.inner.ServeHTTP(list, r)
		if list.Code == http.StatusNotFound && strings.Contains(list.Body.String(), "NoSuchUpload") { // there never was one
			_, _ = io.WriteString(w, `<ListMultipartUploadsResult><Bucket>bucket</Bucket></ListMultipartUploadsResult>`)
			return
		}
		_, _ = w.Write(list.Body.Bytes())
		return
	}
	r.URL.RawQuery = q.Encode()
	s.inner.ServeHTTP(w, r)
}

func refuse(w http.ResponseWriter, status int, code string) {
	w.WriteHeader(status)
	_, _ = io.WriteString(w, `<?xml version="1.0"?><Error><Code>`+code+`</Code><Message>no</Message></Error>`)
}

// reset breaks a connection off.
func reset(w http.ResponseWriter) {
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = c.Close()
}

// halfAnObject begins an answer.
func halfAnObject(w http.ResponseWriter) {
	w.Header().Set("Content-Length", fmt.Sprint(part))
	w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
	_, _ = w.Write(make([]byte, part/2))
	_ = http.NewResponseController(w).Flush()
}

func (s *service) options() store.S3Options {
	return store.S3Options{Bucket: "bucket", Endpoint: s.url, AccessKey: "id", SecretKey: "a secret that nobody may see", Part: part}
}

func (s *service) store(t *testing.T, prefix string) store.Store {
	t.Helper()
	o := s.options()
	o.Prefix = prefix
	made, err := store.NewS3(o)
	require.NoError(t, err)
	return made
}

func (s *service) core(t *testing.T) *minio.Core {
	t.Helper()
	core, err := minio.NewCore(strings.TrimPrefix(s.url, "http://"), &minio.Options{Creds: credentials.NewStaticV4("id", "secret", ""), Region: "us-east-1"})
	require.NoError(t, err)
	return core
}

func (s *service) leave(t *testing.T, name string, age time.Duration) {
	s.past.Store(int64(age))
	defer s.past.Store(0)
	_, err := s.core(t).NewMultipartUpload(t.Context(), "bucket", "of/oneo/"+name, minio.PutObjectOptions{})
	require.NoError(t, err)
}

func (s *service) left(t *testing.T) int {
	list, err := s.core(t).ListMultipartUploads(t.Context(), "bucket", "", "", "", "", 1000)
	require.NoError(t, err)
	return len(list.Uploads)
}

// A prefix is a store by itself, also beside one whose name it begins.
func TestS3Prefix(t *testing.T) {
	t.Parallel()
	service := newService(t)
	s := service.store(t, "of/oneo")
	require.Equal(t, "s3://bucket/of/oneo", s.String())
	require.NoError(t, s.Put(t.Context(), "mine", text("")))
	for _, other := range []string{"", "of", "of/oneo2"} {
		o := service.store(t, other)
		require.NoError(t, o.Put(t.Context(), "elsewhere", text("")))
	}
	require.Equal(t, []string{"mine"}, names(t, s, ""))
	service.leave(t, "x", time.Hour)
	require.NoError(t, service.store(t, "of/one").Sweep(t.Context(), "", 0))
	require.Equal(t, 1, service.left(t))
	// A service that says more than it was asked for.
	service.fail(func(_ http.ResponseWriter, r *http.Request) bool {
		q := r.URL.Query()
		q.Del("prefix")
		r.URL.RawQuery = q.Encode()
		return false
	})
	require.Empty(t, names(t, s, "yours"))
	require.NoError(t, s.Sweep(t.Context(), "y/", 0))
	require.Equal(t, 1, service.left(t))
}

// What passes by itself is not noticed.
func TestS3TriesAgain(t *testing.T) {
	t.Parallel()
	service := newService(t)
	s := service.store(t, "")
	failing := []func(http.ResponseWriter, *http.Request){
		func(w http.ResponseWriter, _ *http.Request) {
			refuse(w, http.StatusInternalServerError, "InternalError")
		},
		func(w http.ResponseWriter, _ *http.Request) { refuse(w, http.StatusServiceUnavailable, "SlowDown") },
		func(w http.ResponseWriter, r *http.Request) { // in the middle of a part
			_, _ = io.CopyN(io.Discard, r.Body, part/2)
			reset(w)
		},
	}
	var requests atomic.Int64
	service.fail(func(w http.ResponseWriter, r *http.Request) bool {
		n := requests.Add(1)
		if n%2 == 0 {
			return false
		}
		failing[int(n/2)%len(failing)](w, r)
		return true
	})
	large := strings.Repeat("large", part)
	require.NoError(t, s.Put(t.Context(), "large", text(large)))
	require.NoError(t, s.Put(t.Context(), "small", text("small")))
	require.Equal(t, []string{"large", "small"}, names(t, s, ""))
	require.True(t, read(t, s, "large") == large)
	require.NoError(t, s.Delete(t.Context(), "small"))
	require.Greater(t, requests.Load(), int64(20))
	service.heal()
	require.Equal(t, []string{"large"}, names(t, s, ""))
	require.Zero(t, service.left(t))
}

// A service that goes away while an object is sent: the object is not there, and what was there is as it was.
func TestS3GoesAway(t *testing.T) {
	t.Parallel()
	large := strings.Repeat("large", part)
	is := func(method, key string) func(*http.Request) bool {
		return func(r *http.Request) bool { return r.Method == method && r.URL.Query().Has(key) }
	}
	part3 := func(r *http.Request) bool { return r.URL.Query().Get("partNumber") == "3" }
	for name, c := range map[string]struct {
		at   func(*http.Request) bool
		fail func(w http.ResponseWriter, r *http.Request)
		kind fault.Kind
		said string
	}{
		"the beginning":        {is(http.MethodPost, "uploads"), func(w http.ResponseWriter, _ *http.Request) { reset(w) }, fault.Unavailable, "cannot be used"},
		"a part":               {part3, func(w http.ResponseWriter, r *http.Request) { _, _ = io.CopyN(io.Discard, r.Body, part/2); reset(w) }, fault.Unavailable, "cannot be used"},
		"a part, 500":          {part3, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 500, "InternalError") }, fault.Unavailable, "cannot be used"},
		"a part, forbidden":    {part3, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 403, "AccessDenied") }, fault.Forbidden, "denies access"},
		"a part, full":         {part3, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 403, "QuotaExceeded") }, fault.TooLarge, "is full"},
		"a part, no room":      {part3, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 507, "Whatever") }, fault.TooLarge, "is full"},
		"the end":              {is(http.MethodPost, "uploadId"), func(w http.ResponseWriter, _ *http.Request) { reset(w) }, fault.Unavailable, "cannot be used"},
		"the end, 200 and yet": {is(http.MethodPost, "uploadId"), func(w http.ResponseWriter, _ *http.Request) { refuse(w, 200, "InvalidPart") }, fault.Unavailable, "cannot be used"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			service := newService(t)
			s := service.store(t, "")
			require.NoError(t, s.Put(t.Context(), "there", text("first")))
			service.fail(func(w http.ResponseWriter, r *http.Request) bool {
				if c.at(r) {
					c.fail(w, r)
				}
				return c.at(r)
			})
			for _, name := range []string{"there", "new"} {
				err := s.Put(t.Context(), name, text(large))
				require.Truef(t, fault.Is(err, c.kind), "%v", err)
				require.ErrorContains(t, err, c.said)
				require.NotContains(t, err.Error(), "secret")
				// Who does not look at what writing says is not believed.
				require.Error(t, s.Put(t.Context(), name, func(w io.Writer) error { _, _ = io.WriteString(w, large); return nil }))
			}
			service.heal()
			require.Equal(t, []string{"there"}, names(t, s, ""))
			require.Equal(t, "first", read(t, s, "there"))
			require.Zero(t, service.left(t), "no parts lie about")
		})
	}
}

// A byte that was changed on its way is found by the service, in a part and in what is one request.
func TestS3ChangedOnTheWay(t *testing.T) {
	t.Parallel()
	service := newService(t)
	s := service.store(t, "")
	service.fail(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut {
			body, _ := io.ReadAll(r.Body)
			body[len(body)/2] ^= 1
			r.Body = io.NopCloser(bytes.NewReader(body))
		}
		return false
	})
	for _, size := range []int{1, 3 * part} {
		require.Error(t, s.Put(t.Context(), "x", text(strings.Repeat("x", size))))
	}
	service.heal()
	require.Empty(t, names(t, s, ""))
	require.Zero(t, service.left(t))
}

// Nobody waits for ever: neither for an answer nor in the middle of one.
func TestS3Hangs(t *testing.T) {
	t.Parallel()
	service := newService(t)
	require.NoError(t, service.store(t, "").Put(t.Context(), "x", text(strings.Repeat("x", part))))
	o := service.options()
	o.Stall = 200 * time.Millisecond
	s, err := store.NewS3(o)
	require.NoError(t, err)
	stop := make(chan struct{})
	defer close(stop)
	service.fail(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && !r.URL.Query().Has("list-type") {
			halfAnObject(w)
		}
		<-stop
		return true
	})
	require.Eventually(t, func() bool { // a machine that is busy may keep even the beginning back
		in, err := s.Get(t.Context(), "x")
		if err != nil {
			return false
		}
		defer in.Close()
		_, err = io.Copy(io.Discard, in)
		require.Error(t, err)
		return true
	}, time.Minute, time.Millisecond)
	_, err = s.List(t.Context(), "")
	require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
	require.True(t, fault.Is(s.Put(t.Context(), "y", text("y")), fault.Unavailable))
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	err = s.Put(ctx, "y", text("y"))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.False(t, fault.Is(err, fault.Unavailable), "who has stopped waiting is told nothing of the store")
}

// An answer that ends too early is no object that was read.
func TestS3ReadBrokenOff(t *testing.T) {
	t.Parallel()
	service := newService(t)
	s := service.store(t, "")
	service.fail(func(w http.ResponseWriter, r *http.Request) bool {
		halfAnObject(w)
		reset(w)
		return true
	})
	in, err := s.Get(t.Context(), "x")
	require.NoError(t, err)
	defer in.Close()
	n, err := io.Copy(io.Discard, in)
	require.Error(t, err)
	require.Less(t, n, int64(part))
}

// What a service says is told as something that can be acted on, without the keys.
func TestS3Refuses(t *testing.T) {
	t.Parallel()
	service := newService(t)
	s := service.store(t, "")
	other, err := store.Open("s3://nowhere?endpoint="+service.url, keys)
	require.NoError(t, err)
	_, err = other.List(t.Context(), "")
	require.True(t, fault.Is(err, fault.Invalid), "%v", err)
	require.ErrorContains(t, err, "no bucket nowhere")
	for code, want := range map[string]struct {
		status int
		kind   fault.Kind
		code   string
	}{
		"AccessDenied":                 {403, fault.Forbidden, "store_forbidden"},
		"InvalidAccessKeyId":           {403, fault.Forbidden, "store_forbidden"},
		"SignatureDoesNotMatch":        {403, fault.Forbidden, "store_forbidden"},
		"RequestTimeTooSkewed":         {403, fault.Forbidden, "store_forbidden"},
		"Unauthorized":                 {401, fault.Forbidden, "store_forbidden"},
		"AuthorizationHeaderMalformed": {400, fault.Invalid, "bad_region"},
		"PermanentRedirect":            {301, fault.Invalid, "bad_region"},
		"MethodNotAllowed":             {405, fault.Unavailable, "store_unreachable"},
	} {
		service.fail(func(w http.ResponseWriter, _ *http.Request) bool { refuse(w, want.status, code); return true })
		_, lerr := s.List(t.Context(), "")
		_, gerr := s.Get(t.Context(), "x")
		for _, err := range []error{
			lerr, gerr, s.Delete(t.Context(), "x"), s.Sweep(t.Context(), "", 0),
			s.Put(t.Context(), "x", text("x")), s.Put(t.Context(), "x", text(strings.Repeat("x", 2*part))),
		} {
			require.Truef(t, fault.Is(err, want.kind), "%s: %v", code, err)
			require.Equal(t, want.code, fault.Of(err).Code, code)
			require.NotContains(t, err.Error(), "secret")
		}
	}
	service.fail(func(w http.ResponseWriter, _ *http.Request) bool { refuse(w, 501, "NotImplemented"); return true })
	require.NoError(t, s.Sweep(t.Context(), "", 0), "who knows no lists of uploads has none that we could take away")

	o := service.options()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	o.Endpoint = "http://" + l.Addr().String()
	require.NoError(t, l.Close())
	away, err := store.NewS3(o)
	require.NoError(t, err, "nothing is connected")
	_, err = away.List(t.Context(), "")
	require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
}

// A list of which one page fails is none.
func TestS3HalfAList(t *testing.T) {
	t.Parallel()
	service := newService(t)
	s := service.store(t, "")
	for i := range 5 {
		require.NoError(t, s.Put(t.Context(), fmt.Sprint("x", i), text("")))
	}
	require.Len(t, names(t, s, ""), 5, "over three pages")
	service.fail(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Has("continuation-token") {
			refuse(w, http.StatusForbidden, "AccessDenied")
			return true
		}
		return false
	})
	all, err := s.List(t.Context(), "")
	require.True(t, fault.Is(err, fault.Forbidden), "%v", err)
	require.Empty(t, all)
	ctx, cancel := context.WithCancel(t.Context())
	service.fail(func(http.ResponseWriter, *http.Request) bool { cancel(); return false })
	all, err = s.List(ctx, "")
	require.True(t, errors.Is(err, context.Canceled), "%v", err)
	require.Empty(t, all)
	_, err = s.List(ctx, "")
	require.True(t, errors.Is(err, context.Canceled), "%v", err)
}

func TestS3Location(t *testing.T) {
	t.Parallel()
	for location, want := range map[string]string{
		"s3://":                                      "no s3:// URL",
		"s3://key:word@bucket":                       "no s3:// URL",
		"s3://bucket?a=%zz":                          "no s3:// URL",
		"s3://bucket#x":                              "no s3:// URL",
		"s3://Bucket_":                               "no name for a bucket",
		"s3://bucket?color=red":                      `"color" is not understood`,
		"s3://bucket?style=perhaps":                  "must be path or host",
		"s3://bucket?endpoint=s3.example":            "must be a URL",
		"s3://bucket?endpoint=ftp://s3.test":         "must be a URL",
		"s3://bucket?endpoint=http://k:word@s3.test": "must be a URL",
		"s3://bucket/../x":                           "no name",
	} {
		_, err := store.Open(location, keys)
		require.ErrorContains(t, err, want, location)
		require.True(t, fault.Is(err, fault.Invalid), location)
		require.NotContains(t, err.Error(), "word")
	}
	for _, missing := range [][]string{nil, keys[:1], keys[1:], {"AWS_ACCESS_KEY_ID=", keys[1]}} {
		_, err := store.Open("s3://bucket", missing)
		require.ErrorContains(t, err, "no keys for S3")
	}
	for location, env := range map[string]string{
		"s3://bucket/a/b?region=eu-central-1&style=path": "", "s3://bucket/a/b/?style=host&endpoint=https://s3.eu-central-1.amazonaws.com": "",
		"s3://bucket/a/b": "AWS_ENDPOINT_URL=http://127.0.0.1:1",
	} {
		s, err := store.Open(location, append([]string{env}, keys...))
		require.NoError(t, err, location)
		require.Equal(t, "s3://bucket/a/b", s.String())
	}
}

// More parts than S3 takes are no object with fewer of them.
func TestS3TooLarge(t *testing.T) {
	t.Parallel()
	service := newService(t)
	o := service.options()
	o.Part = 1
	s, err := store.NewS3(o)
	require.NoError(t, err)
	service.fail(func(w http.ResponseWriter, r *http.Request) bool { // 10,000 times
		if r.Method == http.MethodPut {
			w.Header().Set("ETag", `"x"`)
			return true
		}
		return false
	})
	err = s.Put(t.Context(), "x", text(strings.Repeat("x", 10_002)))
	require.True(t, fault.Is(err, fault.TooLarge), "%v", err)
	require.Equal(t, "object_too_large", fault.Of(err).Code)
	service.heal()
	require.Empty(t, names(t, s, ""))
	require.Zero(t, service.left(t))
}
