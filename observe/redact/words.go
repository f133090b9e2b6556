package redact

import (
	"regexp"
	"strings"
)

// Removed stands where a secret was.
const Removed = "[removed]"

// credential are the words that make a name that of a secret, wherever they
// stand in it.
const credential = `(?:token|secret|passwd|password|passphrase|passcode|client[_-]?assertion|` +
	`(?:api|access|private|signing|encrypt(?:ion)?|svid|hmac|master|(?:pre)?shared|session|license|ipsec|wireguard|ssh|ssl)[_-]?key|key[_-]?data|credentials?|authorization|cookie|session[_-]?id)`

// short are words that are that of a secret only where they stand for themselves:
// DB_PASS, dbPass, pass; not passed, compass.
const short = `(?:(?:[\w.-]*[_.-])?(?:pass|pwd|psk|auth|otp|sas)|PG_?PASS|[a-z0-9]+(?-i:P)ass|[a-z0-9]+(?-i:P)wd)`

var (
	credentialName = regexp.MustCompile(`(?i)` + credential + `|^` + short + `$`)
	// hint is in every text that has such a name in it, and quickly looked for.
	hint        = regexp.MustCompile(`(?i)` + credential + `|pass|pwd|psk|auth|otp|sas`)
	headersName = regexp.MustCompile(`(?i)^(?:[a-z-]*headers?|header_?matches)$`)
	queryName   = regexp.MustCompile(`(?i)^(?:raw_?|url_?)?query(?:_?string)?$`)
	quantity    = regexp.MustCompile(`(?i)(?:ttl|second|expir\w*|size|limit|count|length|total|version)s?$`)
	// reference are names below that of a secret whose values say where it is, and
	// not what.
	reference = regexp.MustCompile(`^(?:name|namespace|key|kind|apiGroup|apiVersion|secretName|items|path|audience|optional|defaultMode|mode|uid|type|[A-Za-z]*(?:Ref|From|Selector))$`)
	number    = regexp.MustCompile(`^(?:0x[0-9a-fA-F]+|[0-9]+)[,.;]?$`)
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
	has  string // stands in each of them; "": nothing does
	of   *regexp.Regexp
	with string // may name groups of it
}

// forms are looked for in every text.
var forms = []form{
	// Tokens: JWS and JWE.
	{"eyJ", regexp.MustCompile(`\beyJ[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*){1,4}`), Removed},
	// PEM, once more in base64, as in kubeconfigs and Secrets: all that begins
	// with "-----BEGIN", but not what is said to be a certificate.
	{"LS0tLS1", regexp.MustCompile(`LS0tLS1CRUdJTi[A-Za-z0-9+/_=-]*`), ""},
	// Private keys in base64 of DER: PKCS #8 and SEC 1 of P-256 and P-384, Ed25519,
	// PKCS #8 and PKCS #1 of RSA.
	{"", regexp.MustCompile(`(?:MIG[A-Za-z0-9+/]AgEAMB|MH[A-Za-z0-9+/]CAQEE|MIGkAgEBBD|MC[A-Za-z0-9+/]CAQAwBQYDK2V|MII[A-Za-z0-9+/]{2,3}IBADANBgkqhki|MII[A-Za-z0-9+/]{2,3}IBAAKC)[A-Za-z0-9+/=_-]*`), Removed},
	// Credentials of HTTP.
	{"", regexp.MustCompile(`(?i)\b(bearer|basic|negotiate)(\s+)([A-Za-z0-9._~+/=:-]{6,})`), "${1}${2}" + Removed},
	{"", regexp.MustCompile(`(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|x-[\w-]*(?:auth|key|token|secret)[\w-]*)(\s*:\s+)([^\s"'\\](?:=\\?"[^"\r\n]*"|[^"'\\\r\n])*)`), "${1}${2}" + Removed},
	// Users and passwords, and questions, in URLs and paths. A password can have
	// "@" and "/" in it, where they should not be.
	{"@", regexp.MustCompile(`(:?//)[^\s"'<>]*[^\s"'<>/]@`), "${1}" + Removed + "@"},
	{"%40", regexp.MustCompile(`(?i)(%3A%2F%2F)[^\s"'<>&]+%40`), "${1}" + Removed + "%40"},
	{"@", regexp.MustCompile(`[^\s:"'=]+:[^\s"']+@((?:tcp|udp|unix)\()`), Removed + "@${1}"}, // of databases
	{"?", regexp.MustCompile(`(/[^\s"'?<>]*\?)([^\s"'<>\\#]+)`), "${1}" + Removed},
	// Well-known makers' tokens.
	{"gh", regexp.MustCompile(`\bgh[pousr]_[A-Za-z0-9]{20,}`), Removed},
	{"github_pat_", regexp.MustCompile(`\bgithub_pat_[A-Za-z0-9_]{20,}`), Removed},
	{"glpat-", regexp.MustCompile(`\bglpat-[A-Za-z0-9_-]{16,}`), Removed},
	{"IA", regexp.MustCompile(`\b(?:AKIA|ASIA)[0-9A-Z]{16}\b`), Removed},
	{"AIza", regexp.MustCompile(`\bAIza[A-Za-z0-9_-]{30,}`), Removed},
	{"xox", regexp.MustCompile(`\bxox[a-z]-[A-Za-z0-9-]{10,}`), Removed},
	{"hooks.slack.com", regexp.MustCompile(`(hooks\.slack\.com/services/)[A-Za-z0-9/]+`), "${1}" + Removed},
	{"hv", regexp.MustCompile(`\bhv[sbr]\.[A-Za-z0-9_-]{20,}`), Removed},
	{"_", regexp.MustCompile(`\b(?:npm_|dckr_pat_|[sr]k_live_)[A-Za-z0-9_-]{20,}`), Removed},
	{"sk-", regexp.MustCompile(`\bsk-(?:ant-|proj-)?[A-Za-z0-9_]{32,}[A-Za-z0-9_-]*`), Removed},
	{"ya29.", regexp.MustCompile(`\bya29\.[A-Za-z0-9_-]{20,}`), Removed},
	{"AGE-SECRET-KEY-1", regexp.MustCompile(`\bAGE-SECRET-KEY-1[0-9A-Z]{50,}`), Removed},
	{".", regexp.MustCompile(`\b[a-z0-9]{6}\.[a-z0-9]{16}\b`), Removed}, // of kubeadm
}

var (
	// pair is a name and a value: password=x, "token": "x", --api-key 'x'.
	pair = regexp.MustCompile(`(?i)([\w.-]*` + credential + `[\w.-]*|\b` + short + `)(\\?["']?(?:\x1b\[[0-9;]*m)*\s*[:=]\s*(?:\x1b\[[0-9;]*m)*)(\\"[^"\\]*\\"|"(?:[^"\\]|\\.)*"|'[^']*'|[^\s"'\\]+)`)
	// leading is one that a line begins with: the rest of the line is the value.
	leading = regexp.MustCompile(`(?i)^(\s*(?:-\s+)?(?:export\s+)?["']?)([\w.-]*` + credential + `[\w.-]*|` + short + `)(["']?\s*[:=]\s*)(\S.*?)(,?\s*)$`)
	// flagged is one of a command line: --token x, --token "x y", ["--token", "x"].
	flagged = regexp.MustCompile(`(?i)(--?[\w-]*` + credential + `[\w-]*|--(?:pass|auth|psk))(\\?["'],\s*|\s+)(\\"[^"\\]*\\"|"(?:[^"\\]|\\.)*"|'[^']*'|[^\s"'\\-][^\s"']{5,})`)
	// named is the first of two lines: name: DB_PASSWORD, then value: x.
	named = regexp.MustCompile(`(?i)^\s*(?:-\s+)?["']?(?:name|key)["']?\s*[:=]\s*["']?([\w.-]+)["']?,?\s*$`)
	value = regexp.MustCompile(`(?i)^(\s*(?:-\s+)?["']?value["']?\s*[:=]\s*)(\S.*)$`)
	// scalar is the begin of a value that stands on the lines below, in YAML.
	scalar = regexp.MustCompile(`(?i)^(\s*(?:-\s+)?)["']?([\w.-]*` + credential + `[\w.-]*)["']?\s*:\s*(?:[|>][+-]?[0-9]?\s*)?$`)

	pemBegin  = regexp.MustCompile(`-----BEGIN [^-\r\n]*PRIVATE KEY[^-\r\n]*-----`)
	pemEnd    = regexp.MustCompile(`-----END [^-\r\n]*PRIVATE KEY[^-\r\n]*-----`)
	pemHeader = regexp.MustCompile(`(?i)\b(?:proc-type|dek-info|comment|version|hash):`)
	base64ish = regexp.MustCompile(`^[\sA-Za-z0-9+/=_\\"'|>,-]*$`)
	base64Run = regexp.MustCompile(`[A-Za-z0-9+/=]{24,}`)
)
