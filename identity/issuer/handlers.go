package issuer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
)

// svid answers a request for a node's SVID.
func (s *Server) svid(w http.ResponseWriter, r *http.Request) {
	who := []zap.Field{zap.String("remote", r.RemoteAddr)}
	answer, told, err := s.issue(r)
	who = append(who, told...)
	if err == nil {
		s.count("")
		s.log.Info("issued an SVID", who...)
		reply(w, http.StatusOK, answer)
		return
	}
	var no *refused
	if !errors.As(err, &no) {
		no = refuse(RefusedUnavailable, "%v", err)
	}
	s.count(no.reason)
	s.log.Warn("refused an SVID", append(who, zap.String("reason", string(no.reason)), zap.String("detail", no.detail))...)
	code := http.StatusForbidden
	switch no.reason {
	case RefusedNoToken, RefusedToken:
		code = http.StatusUnauthorized
	case RefusedRequest:
		code = http.StatusBadRequest
	case RefusedTooMany:
		code = http.StatusTooManyRequests
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(refill.Seconds()))))
	case RefusedUnavailable:
		code = http.StatusServiceUnavailable
	}
	reply(w, code, Problem{Reason: string(no.reason), Message: no.detail})
}

// issue decides on a request and carries it out. who tells of its sender what
// is known, also with an error.
func (s *Server) issue(r *http.Request) (answer Issued, who []zap.Field, err error) {
	if wait := s.sources.take(source(r.RemoteAddr), time.Now()); wait > 0 {
		return answer, nil, refuse(RefusedTooMany, "%s may ask again in %s", source(r.RemoteAddr), wait.Round(time.Second))
	}
	token, err := bearer(r)
	if err != nil {
		return answer, nil, err
	}
	der, err := io.ReadAll(io.LimitReader(r.Body, MaxRequest+1))
	if err != nil || len(der) > MaxRequest {
		return answer, nil, refuse(RefusedRequest, "the certificate request cannot be read, or is longer than %d bytes", MaxRequest)
	}
	key, err := requestedKey(der) // before the API server is troubled
	if err != nil {
		return answer, nil, err
	}
	review, err := s.review(r.Context(), token)
	if err != nil {
		return answer, nil, err
	}
	who = describe(review)
	party, err := s.cfg.Rules.Attest(review)
	if err != nil {
		return answer, who, err
	}
	if wait := s.limits.take(party, time.Now()); wait > 0 {
		return answer, who, refuse(RefusedTooMany, "node %s may ask again in %s", party.Node, wait.Round(time.Second))
	}
	id, err := spiffeid.FromPath(s.cfg.Keeper.cfg.TrustDomain, party.Path())
	if err != nil {
		return answer, who, refuse(RefusedNodeName, "%v", err)
	}
	made, err := s.cfg.Keeper.sign(key, id)
	if err != nil {
		return answer, who, err
	}
	cert, err := made.parse()
	if err != nil {
		return answer, who, err
	}
	bundle, err := made.ring.bundle()
	if err != nil {
		return answer, who, err
	}
	who = append(who, zap.Stringer("spiffe_id", id), zap.String("serial", cert.SerialNumber.Text(16)), zap.Time("expires", cert.NotAfter))
	return Issued{Certificate: made.der, Bundle: bundle}, who, nil
}

// bearer returns the token of a request.
func bearer(r *http.Request) (string, error) {
	values := r.Header.Values("Authorization")
	if len(values) != 1 {
		return "", refuse(RefusedNoToken, "want one Authorization header, got %d", len(values))
	}
	token, ok := strings.CutPrefix(values[0], "Bearer ")
	if !ok || token == "" || len(token) > MaxToken {
		return "", refuse(RefusedNoToken, "want `Authorization: Bearer TOKEN` of at most %d bytes", MaxToken)
	}
	return token, nil
}

// review asks the API server, with few others at a time.
func (s *Server) review(ctx context.Context, token string) (Review, error) {
	select {
	case s.reviews <- struct{}{}:
		defer func() { <-s.reviews }()
	case <-ctx.Done():
		return Review{}, errors.New("too many requests wait for the API server")
	}
	review, err := s.cfg.Reviewer.Review(ctx, token, s.cfg.Rules.Audience)
	if err != nil {
		// No answer is no: an SVID is given on the API server's word only.
		return Review{}, fmt.Errorf("the API server does not review the token: %w", err)
	}
	return review, nil
}

// describe is what a log says of a token's owner. The token itself is in no log.
func describe(v Review) (fields []zap.Field) {
	if v.Username != "" {
		fields = append(fields, zap.String("username", v.Username))
	}
	for _, claim := range []struct{ field, key string }{{"node", extraNode}, {"node_uid", extraNodeUID}, {"pod", extraPod}, {"pod_uid", extraPodUID}, {"credential", extraCredential}} {
		if values := v.Extra[claim.key]; len(values) > 0 {
			fields = append(fields, zap.Strings(claim.field, values))
		}
	}
	return fields
}

// count counts an SVID, or a refusal.
func (s *Server) count(reason Refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if reason == "" {
		s.issued++
		return
	}
	s.refused[reason]++
}

// bundle answers with the trust bundle. Its sequence is the ETag.
func (s *Server) bundle(w http.ResponseWriter, r *http.Request) {
	data, sequence, err := s.cfg.Keeper.bundle()
	if err != nil {
		reply(w, http.StatusServiceUnavailable, Problem{Reason: string(RefusedUnavailable), Message: err.Error()})
		return
	}
	tag := `"` + strconv.FormatUint(sequence, 10) + `"`
	w.Header().Set("ETag", tag)
	if slices.Contains(r.Header.Values("If-None-Match"), tag) {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(data) //nolint:errcheck // who has gone does not read
}

// Status tells of the issuer.
func (s *Server) Status() Status {
	status := s.cfg.Keeper.status()
	s.mu.Lock()
	defer s.mu.Unlock()
	status.Issued, status.Refused = s.issued, map[string]uint64{}
	for reason, n := range maps.All(s.refused) {
		status.Refused[string(reason)] = n
	}
	return status
}

// health tells whether SVIDs can be signed: a ConfigMap that cannot be written
// is a problem that Status tells of, and no reason to send agents away.
func (s *Server) health(w http.ResponseWriter, _ *http.Request) {
	if _, err := s.cfg.Keeper.current(); err != nil {
		reply(w, http.StatusServiceUnavailable, Problem{Reason: string(RefusedUnavailable), Message: err.Error()})
		return
	}
	fmt.Fprintln(w, "ok")
}

func (s *Server) status(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, s.Status())
}

func reply(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(body) //nolint:errcheck // who has gone does not read
}
