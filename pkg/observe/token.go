package observe

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"strings"
)

// Token is what GET /stats and GET /logs want as a bearer: whoever has the secret of the installation, as a command with its
// configuration does, can derive it, and the secret cannot be found from it. Empty: there is no secret.
func Token(secret []byte) string {
	if len(secret) == 0 {
		return ""
	}
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte("oneo ops"))
	return hex.EncodeToString(mac.Sum(nil))
}

// Guard lets through whoever brings the token. Without a secret there is nothing at the path.
func Guard(secret []byte, h http.Handler) http.Handler {
	token := Token(secret)
	if token == "" {
		return http.NotFoundHandler()
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		given, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !bearer || !hmac.Equal([]byte(given), []byte(token)) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="oneo ops"`)
			http.Error(w, "the token of the operators' listener is missing or wrong", http.StatusUnauthorized)
			return
		}
		h.ServeHTTP(w, r)
	})
}
