package agent

import "testing"

func TestWithoutDNS(t *testing.T) {
	const service = "https://portcullis-issuer.portcullis.svc.cluster.local:4261"
	for name, c := range map[string]struct{ url, namespace, host, want string }{
		"by its address":               {service, "portcullis", "10.96.0.7", "https://10.96.0.7:4261"},
		"by an IPv6 address":           {service, "portcullis", "fd00::7", "https://[fd00::7]:4261"},
		"without a port":               {"https://portcullis-issuer.portcullis.svc", "portcullis", "fd00::7", "https://[fd00::7]"},
		"a service that came later":    {service, "portcullis", "", service},
		"a headless one":               {service, "portcullis", "None", service},
		"of another namespace":         {service, "other", "10.96.0.7", service},
		"no pod":                       {service, "", "10.96.0.7", service},
		"an address":                   {"https://192.0.2.9:4261", "portcullis", "10.96.0.7", "https://192.0.2.9:4261"},
		"a host outside":               {"https://issuer.portcullis.example:4261", "portcullis", "10.96.0.7", "https://issuer.portcullis.example:4261"},
		"what is no URL, told of then": {"https://[::1", "portcullis", "10.96.0.7", "https://[::1"},
	} {
		t.Run(name, func(t *testing.T) {
			getenv := func(key string) string {
				if key == "PORTCULLIS_ISSUER_SERVICE_HOST" {
					return c.host
				}
				return ""
			}
			if got := withoutDNS(c.url, c.namespace, getenv); got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}
