package redact

import (
	"regexp"
	"strings"
)

// Removed stands where a secret was.
const Removed = "[removed]"

// credential are the words that make a name that of a secret.
const credential = `(?:token|secret|passwd|password|passphrase|passcode|api[_-]?key|access[_-]?key|private[_-]?key|signing[_-]?key|encryption[_-]?key|key[_-]?data|svid[_-]?key|credentials?|authorization|cookie)`

var (
	credentialName = regexp.MustCompile(`(?i)` + credential)
	headersName    = regexp.MustCompile(`(?i)^(?:[a-z-]*headers?|header_?matches)$`)
	queryName      = regexp.MustCompile(`(?i)^(?:raw_?|url_?)?query(?:_?string)?$`)
	quantity       = regexp.MustCompile(`(?i)(?:ttl|second|expir\w*|size|limit|count|length|total|version)s?$`)
	number         = regexp.MustCompile(`^(?:0x[0-9a-fA-F]+|[0-9]+)[,.;]?$`)
	// places are where files are; of what begins so, the rest is their path. Base64
	// can begin with a slash, but not with these.
	places = regexp.MustCompile(`^(?:unix://)?/(?:etc|var|run|tmp|proc|sys|opt|home|root|usr|dev)/[\w./@%+:-]+$`)
)

// harmless are names that hold such a word and whose values are none: Kubernetes'
// references, and the names of settings.
var harmless = map[string]bool{
	"secretname": true, "secretnames": true, "secretref": true, "secretkeyref": true, "imagepullsecrets": true, "tokenreviews": true,
	"automountserviceaccounttoken": true, "serviceaccounttoken": true, "authorizationmode": true, "tokenexpirationseconds": true,
	"authorizationk8sio": true, "rbacauthorizationk8sio": true,
}

var separators = strings.NewReplacer("_", "", "-", "", ".", "")

// secretName reports whether what a name stands for is to be removed.
func secretName(name string) bool {
	return credentialName.MatchString(name) && !harmless[separators.Replace(strings.ToLower(name))]
}

// plainValue reports whether the value of such a name is none all the same: a
// switch, nothing, a path, a number that counts something, a socket's cookie.
func plainValue(name, value string) bool {
	v, _, _ := strings.Cut(value, " #") // a comment
	v = strings.TrimRight(strings.Trim(strings.TrimSpace(v), `"'`), ",;")
	switch strings.ToLower(v) {
	case "", "true", "false", "null", "none", "nil", "~", "{", "[", "{}", "[]", "|", ">", "|-", ">-", strings.ToLower(Removed):
		return true
	}
	if number.MatchString(v) {
		return quantity.MatchString(name) || strings.Contains(strings.ToLower(name), "cookie")
	}
	return places.MatchString(v)
}

// form is a secret that is known by what it looks like.
type form struct {
	of   *regexp.Regexp
	with string // may name groups of it
}

// forms are looked for in every text.
var forms = []form{
	// Tokens: JWS and JWE.
	{regexp.MustCompile(`\beyJ[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*){1,4}`), Removed},
	// PEM, once more in base64, as in kubeconfigs and Secrets: all that begins
	// with "-----BEGIN", but not what is said to be a certificate.
	{regexp.MustCompile(`LS0tLS1CRUdJTi[A-Za-z0-9+/_=-]*`), ""},
	// Private keys in base64 of DER: PKCS #8 and SEC 1 of P-256 and P-384, Ed25519,
	// PKCS #8 and PKCS #1 of RSA.
	{regexp.MustCompile(`(?:MIG[A-Za-z0-9+/]AgEAMB|MH[A-Za-z0-9+/]CAQEE|MIGkAgEBBD|MC[A-Za-z0-9+/]CAQAwBQYDK2V|MII[A-Za-z0-9+/]{2,3}IBADANBgkqhki|MII[A-Za-z0-9+/]{2,3}IBAAKC)[A-Za-z0-9+/=_-]*`), Removed},
	// Credentials of HTTP.
	{regexp.MustCompile(`(?i)\b(bearer|basic|negotiate)(\s+)([A-Za-z0-9._~+/=:-]{6,})`), "${1}${2}" + Removed},
	{regexp.MustCompile(`(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|x-[\w-]*(?:auth|key|token|secret)[\w-]*)(\s*:\s+)([^\s"'\\][^"'\\\r\n]*)`), "${1}${2}" + Removed},
	// Users and passwords, and questions, in URLs and paths.
	{regexp.MustCompile(`(://)[^\s/@"'<>\[\]]+@`), "${1}" + Removed + "@"},
	{regexp.MustCompile(`(/[^\s"'?<>]*\?)([^\s"'<>\\#]+)`), "${1}" + Removed},
	// Well-known makers' tokens.
	{regexp.MustCompile(`\bgh[pousr]_[A-Za-z0-9]{20,}`), Removed},
	{regexp.MustCompile(`\bgithub_pat_[A-Za-z0-9_]{20,}`), Removed},
	{regexp.MustCompile(`\bglpat-[A-Za-z0-9_-]{16,}`), Removed},
	{regexp.MustCompile(`\b(?:AKIA|ASIA)[0-9A-Z]{16}\b`), Removed},
	{regexp.MustCompile(`\bAIza[A-Za-z0-9_-]{30,}`), Removed},
	{regexp.MustCompile(`\bxox[a-z]-[A-Za-z0-9-]{10,}`), Removed},
	{regexp.MustCompile(`\b[a-z0-9]{6}\.[a-z0-9]{16}\b`), Removed}, // of kubeadm
}

var (
	// pair is a name and a value: password=x, "token": "x", --api-key 'x'.
	pair = regexp.MustCompile(`(?i)([\w.-]*` + credential + `[\w.-]*)(\\?["']?\s*[:=]\s*)(\\"[^"\\]*\\"|"(?:[^"\\]|\\.)*"|'[^']*'|[^\s"'\\]+)`)
	// leading is one that a line begins with: the rest of the line is the value.
	leading = regexp.MustCompile(`(?i)^(\s*(?:-\s+)?(?:export\s+)?["']?)([\w.-]*` + credential + `[\w.-]*)(["']?\s*[:=]\s*)(\S.*?)(,?\s*)$`)
	// flagged is one of a command line: --token x.
	flagged = regexp.MustCompile(`(?i)(--?[\w-]*` + credential + `[\w-]*)(\s+)([^\s"'-][^\s"']{5,})`)
	// named is the first of two lines: name: DB_PASSWORD, then value: x.
	named = regexp.MustCompile(`(?i)^\s*(?:-\s+)?["']?(?:name|key)["']?\s*[:=]\s*["']?([\w.-]+)["']?,?\s*$`)
	value = regexp.MustCompile(`(?i)^(\s*(?:-\s+)?["']?value["']?\s*[:=]\s*)(\S.*)$`)
	// scalar is the begin of a value that stands on the lines below, in YAML.
	scalar = regexp.MustCompile(`(?i)^(\s*(?:-\s+)?)["']?([\w.-]*` + credential + `[\w.-]*)["']?\s*:\s*[|>][+-]?[0-9]?\s*$`)

	pemBegin  = regexp.MustCompile(`-----BEGIN [^-\r\n]*PRIVATE KEY[^-\r\n]*-----`)
	pemEnd    = regexp.MustCompile(`-----END [^-\r\n]*PRIVATE KEY[^-\r\n]*-----`)
	pemHeader = regexp.MustCompile(`(?i)\b(?:proc-type|dek-info|comment|version|hash):`)
	base64ish = regexp.MustCompile(`^[\sA-Za-z0-9+/=_\\"'|>,-]*$`)
	base64Run = regexp.MustCompile(`[A-Za-z0-9+/=]{24,}`)
)
