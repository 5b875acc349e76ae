package store

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/s3utils"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// S3 keeps objects in a bucket of S3, or of a service that speaks its protocol.
type S3 struct {
	client *minio.Core
	bucket string
	prefix string // empty, or with a slash at its end
	part   int    // bytes
}

var _ Store = (*S3)(nil)

// S3Options say where a bucket is.
type S3Options struct {
	Bucket, Prefix string
	// Endpoint is the service's URL; empty: Amazon's of the region.
	Endpoint string
	// Region is what requests are signed for; empty: what an endpoint of Amazon's says, else us-east-1.
	Region string
	// Style is how requests name the bucket: "path", "host", or empty: in the host's name with those services of which it is
	// known that they want it, else in the path.
	Style                       string
	AccessKey, SecretKey, Token string
	// Part is the size of the parts of large objects, in bytes; 0: 32 MiB. One of them is in memory for each object that
	// is being written, and there are at most 10,000 of an object.
	Part int
	// Stall is how long nothing may go by on a connection before it is given up; 0: a minute.
	Stall time.Duration
}

const (
	s3Part  = 32 << 20
	s3Parts = 10_000 // what S3 allows
	s3Stall = time.Minute
	// s3Tries is how often a request is sent that fails in a way that may pass.
	s3Tries = 6
	// s3Undo is how long an upload may take to be given up.
	s3Undo = 30 * time.Second
)

// openS3 reads s3://bucket/prefix?endpoint=...&region=...&style=..., and what is not in it from the environment, in the names
// that Amazon's tools use.
func openS3(location string, environ []string) (Store, error) {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "backup.url: "+format, args...).WithCode("bad_store").
			WithHint("write s3://bucket/prefix, and behind it ?endpoint=https://host, &region= and &style=path or host as the service needs them")
	}
	u, err := url.Parse(location)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" {
		return nil, bad("this is no s3:// URL") // it is not told: a key may be in it
	}
	env := map[string]string{}
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		env[name] = value
	}
	o := S3Options{
		Bucket: u.Host, Prefix: strings.Trim(u.Path, "/"),
		Endpoint:  cmp.Or(env["AWS_ENDPOINT_URL_S3"], env["AWS_ENDPOINT_URL"]),
		Region:    cmp.Or(env["AWS_REGION"], env["AWS_DEFAULT_REGION"]),
		AccessKey: env["AWS_ACCESS_KEY_ID"], SecretKey: env["AWS_SECRET_ACCESS_KEY"], Token: env["AWS_SESSION_TOKEN"],
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, bad("this is no s3:// URL")
	}
	for key, values := range query {
		switch key {
		case "endpoint":
			o.Endpoint = values[0]
		case "region":
			o.Region = values[0]
		case "style":
			o.Style = values[0]
		default:
			return nil, bad("%q is not understood", key)
		}
	}
	s, err := NewS3(o)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// NewS3 keeps objects in a bucket, which must be there. It connects nothing.
func NewS3(o S3Options) (*S3, error) {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, format, args...).WithCode("bad_store")
	}
	if o.Prefix != "" {
		if err := checkName(o.Prefix); err != nil {
			return nil, err
		}
		o.Prefix += "/"
	}
	if err := s3utils.CheckValidBucketNameStrict(o.Bucket); err != nil {
		return nil, bad("%q is no name for a bucket", o.Bucket)
	}
	if o.AccessKey == "" || o.SecretKey == "" {
		return nil, fault.New(fault.Invalid, "no keys for S3 are in the environment").WithCode("no_store_keys").
			WithHint("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
	}
	style, known := map[string]minio.BucketLookupType{"": minio.BucketLookupAuto, "path": minio.BucketLookupPath, "host": minio.BucketLookupDNS}[o.Style]
	if !known {
		return nil, bad("the style of S3's requests must be path or host")
	}
	u, err := url.Parse(cmp.Or(o.Endpoint, "https://s3."+cmp.Or(o.Region, "us-east-1")+".amazonaws.com"))
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.User != nil {
		return nil, bad("the endpoint of S3 must be a URL, for example https://s3.example.com")
	}
	transport, err := minio.DefaultTransport(u.Scheme == "https")
	if err != nil {
		return nil, err
	}
	dial, stall := transport.DialContext, cmp.Or(o.Stall, s3Stall)
	transport.ResponseHeaderTimeout = stall
	transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return impatient{c, stall}, nil
	}
	client, err := minio.NewCore(u.Host, &minio.Options{
		Creds: credentials.NewStaticV4(o.AccessKey, o.SecretKey, o.Token), Secure: u.Scheme == "https", Transport: transport,
		Region: cmp.Or(o.Region, s3utils.GetRegionFromURL(*u), "us-east-1"), BucketLookup: style, MaxRetries: s3Tries,
	})
	if err != nil {
		return nil, bad("the store in S3 cannot be used: %s", err)
	}
	return &S3{client: client, bucket: o.Bucket, prefix: o.Prefix, part: cmp.Or(o.Part, s3Part)}, nil
}

// impatient is a connection that fails when nothing has gone by for some time, in neither direction.
type impatient struct {
	net.Conn
	stall time.Duration
}

func (c impatient) Read(p []byte) (int, error) {
	_ = c.SetDeadline(time.Now().Add(c.stall)) // one that cannot have it is closed already
	return c.Conn.Read(p)
}

func (c impatient) Write(p []byte) (int, error) {
	_ = c.SetDeadline(time.Now().Add(c.stall))
	return c.Conn.Write(p)
}

func (s *S3) String() string { return "s3://" + path.Join(s.bucket, s.prefix) }

// Put implements Store.
func (s *S3) Put(ctx context.Context, name string, write func(io.Writer) error) error {
	if err := checkName(name); err != nil {
		return err
	}
	u := &upload{s: s, ctx: ctx, key: s.prefix + name}
	err := write(u)
	if err == nil {
		err = u.err // also when nobody has looked at it
	}
	if err == nil {
		err = u.end()
	}
	if err != nil {
		u.abort()
	}
	return err
}

// upload is an object that is being written. What is not larger than a part is sent as one request; else the parts are sent
// one after the other, and are no object before the last request.
type upload struct {
	s     *S3
	ctx   context.Context
	key   string
	part  []byte // that is being filled
	id    string // of an upload in parts; empty: none was begun
	parts []minio.CompletePart
	err   error // why it can be no object any more
}

func (u *upload) Write(p []byte) (n int, err error) {
	for u.err == nil && n < len(p) {
		if len(u.part) == u.s.part {
			u.err = u.send()
			continue
		}
		k := min(len(p)-n, u.s.part-len(u.part))
		u.part = append(u.part, p[n:n+k]...)
		n += k
	}
	return n, u.err
}

// send sends the part that is filled.
func (u *upload) send() error {
	if u.id == "" {
		id, err := u.s.client.NewMultipartUpload(u.ctx, u.s.bucket, u.key, minio.PutObjectOptions{ContentType: "application/octet-stream"})
		if err != nil {
			return u.s.failed(u.ctx, err)
		}
		u.id = id
	}
	if len(u.parts) == s3Parts {
		return fault.New(fault.TooLarge, "more than %d parts of %d MiB are no object in S3", s3Parts, u.s.part>>20).WithCode("object_too_large")
	}
	// The service compares the sum with what it got: with a signature alone it does so only where there is no TLS.
	sent, err := u.s.client.PutObjectPart(u.ctx, u.s.bucket, u.key, u.id, len(u.parts)+1, bytes.NewReader(u.part), int64(len(u.part)),
		minio.PutObjectPartOptions{Sha256Hex: sum(u.part), DisableContentSha256: true})
	if err != nil {
		return u.s.failed(u.ctx, err)
	}
	u.parts = append(u.parts, minio.CompletePart{PartNumber: sent.PartNumber, ETag: sent.ETag})
	u.part = u.part[:0]
	return nil
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// end makes an object of what was written.
func (u *upload) end() error {
	if u.id == "" {
		_, err := u.s.client.PutObject(u.ctx, u.s.bucket, u.key, bytes.NewReader(u.part), int64(len(u.part)), "", sum(u.part),
			minio.PutObjectOptions{ContentType: "application/octet-stream", DisableContentSha256: true})
		return u.s.failed(u.ctx, err)
	}
	if err := u.send(); err != nil {
		return err
	}
	_, err := u.s.client.CompleteMultipartUpload(u.ctx, u.s.bucket, u.key, u.id, u.parts, minio.PutObjectOptions{})
	return u.s.failed(u.ctx, err)
}

// abort gives an upload in parts up. Where that cannot be said to the service, Sweep does it one day.
func (u *upload) abort() {
	if u.id == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(u.ctx), s3Undo)
	defer cancel()
	_ = u.s.client.AbortMultipartUpload(ctx, u.s.bucket, u.key, u.id)
}

// Get implements Store.
func (s *S3) Get(ctx context.Context, name string) (io.ReadCloser, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	in, _, _, err := s.client.GetObject(ctx, s.bucket, s.prefix+name, minio.GetObjectOptions{})
	if minio.ToErrorResponse(err).Code == minio.NoSuchKey {
		return nil, notFound(err, name)
	}
	if err != nil {
		return nil, s.failed(ctx, err)
	}
	return in, nil
}

// List implements Store.
func (s *S3) List(ctx context.Context, prefix string) ([]Object, error) {
	var all []Object
	for o := range s.client.ListObjectsIter(ctx, s.bucket, minio.ListObjectsOptions{Prefix: s.prefix + prefix, Recursive: true}) {
		if o.Err != nil {
			return nil, s.failed(ctx, o.Err)
		}
		if name := strings.TrimPrefix(o.Key, s.prefix); strings.HasPrefix(o.Key, s.prefix+prefix) && checkName(name) == nil {
			all = append(all, Object{Name: name, Size: o.Size, Modified: o.LastModified})
		}
	}
	if err := ctx.Err(); err != nil { // then it ends without a word
		return nil, err
	}
	slices.SortFunc(all, func(a, b Object) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// Delete implements Store.
func (s *S3) Delete(ctx context.Context, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	err := s.client.RemoveObject(ctx, s.bucket, s.prefix+name, minio.RemoveObjectOptions{})
	if minio.ToErrorResponse(err).Code == minio.NoSuchKey {
		return nil
	}
	return s.failed(ctx, err)
}

// Sweep implements Store. A service that does not list what was begun takes it away itself, or by a rule of the bucket.
func (s *S3) Sweep(ctx context.Context, prefix string, age time.Duration) error {
	if err := checkPrefix(prefix); err != nil {
		return err
	}
	var found []minio.ObjectMultipartInfo
	for key, id := "", ""; ; {
		page, err := s.client.ListMultipartUploads(ctx, s.bucket, s.prefix+prefix, key, id, "", 1000)
		if minio.ToErrorResponse(err).StatusCode == http.StatusNotImplemented {
			return nil
		}
		if err != nil {
			return s.failed(ctx, err)
		}
		found = append(found, page.Uploads...)
		if !page.IsTruncated {
			break
		}
		if page.NextKeyMarker == key && page.NextUploadIDMarker == id {
			return s.failed(ctx, errors.New("a list of uploads goes on and does not say where"))
		}
		key, id = page.NextKeyMarker, page.NextUploadIDMarker
	}
	for _, u := range found {
		if !strings.HasPrefix(u.Key, s.prefix+prefix) || !old(u.Initiated, age) {
			continue
		}
		err := s.client.AbortMultipartUpload(ctx, s.bucket, u.Key, u.UploadID)
		if err != nil && minio.ToErrorResponse(err).Code != minio.NoSuchUpload { // it ended meanwhile
			return s.failed(ctx, err)
		}
	}
	return nil
}

// failed says of a service's answer, if it is an error, what it means.
func (s *S3) failed(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil {
		return failed(ctx, err, s)
	}
	answer := minio.ToErrorResponse(err)
	switch answer.Code {
	case minio.NoSuchBucket, minio.InvalidBucketName:
		return fault.Wrap(err, fault.Invalid, "there is no bucket %s", s.bucket).WithCode("no_bucket").WithHint("make it, or mend backup.url")
	case minio.AuthorizationHeaderMalformed, minio.InvalidRegion, "PermanentRedirect", "TemporaryRedirect":
		return fault.Wrap(err, fault.Invalid, "the bucket %s is in another region", s.bucket).WithCode("bad_region").WithHint("set AWS_REGION, or add ?region= to backup.url")
	case minio.RequestTimeTooSkewed:
		return fault.Wrap(err, fault.Forbidden, "the clock of this machine and that of the store %s are too far apart", s).WithCode("store_forbidden")
	case "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded":
		return full(err, s)
	}
	switch answer.StatusCode {
	case http.StatusInsufficientStorage:
		return full(err, s)
	case http.StatusForbidden, http.StatusUnauthorized:
		return forbidden(err, s).WithHint("see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, and what they may do: get, put, list and delete objects, list and abort uploads")
	}
	if answer.Code != "" {
		err = fmt.Errorf("%s: %w", answer.Code, err)
	}
	return failed(ctx, err, s)
}
