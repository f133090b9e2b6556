package sysdump

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"portcullis/datapath/doctor"
	"portcullis/observe/archive"
)

// Config says what to look at: the agent's settings.
type Config struct {
	Agent        *Process // nil: none runs
	AgentProblem error    // why there is none

	Program any // version of who gathers, as JSON

	Socket         string // of the agent's local API
	HubbleSocket   string // "": none
	PinDir         string
	JournalDir     string
	StateDir       string
	AuditLog       string
	ProxyDir       string
	CNIConfDir     string // "": /etc/cni/net.d, where there is one
	ConfigFile     string // "": none
	ExportConfig   string // "": none
	MetricsAddress string // "": none
	Port           uint16 // of the agents
	MarkMask       uint32

	Settings []byte       // in force, as a file of settings; nil: not known
	Checked  doctor.Check // of the settings

	Flows int   // of the last ones
	Logs  int64 // bytes, of each log's end
}

// Bounds of what is read of one thing.
const (
	auditBytes = 1 << 20
	fileBytes  = 1 << 20
	mostLooked = 1 << 20 // entries of a map
	mostShown  = 4096
)

// Parts returns what there is to gather on a node.
func Parts(c *Config) []archive.Part {
	part := func(name string, gather func(context.Context, *archive.Files) error) archive.Part {
		return archive.Part{Name: name, Gather: gather}
	}
	out := []archive.Part{
		part("versions", c.versions),
		part("config", c.config),
		part("doctor", c.doctor),
	}
	out = append(out, c.agentParts()...)
	out = append(out,
		part("flows", c.flows),
		part("metrics", c.metrics),
		part("audit", c.audit),
		part("logs", c.logs),
		part("process", c.process),
		part("bpf/objects", c.objects),
		part("bpf/maps", c.maps),
		part("network/devices", c.inNetwork(devices)),
		part("network/routes", c.inNetwork(routes)),
		part("network/netfilter", c.inNetwork(netfilter)),
		part("network/sockets", c.inNetwork(sockets)),
		part("network/sysctl", c.inNetwork(sysctls)),
		part("journal", c.journal),
		part("cgroups", c.cgroups),
		part("cni", c.cni),
		part("kernel/config", kernelConfig),
		part("kernel/log", kernelLog),
		part("mounts", c.mounts),
	)
	return out
}

// PartTimeout is how long one part may take.
const PartTimeout = 30 * time.Second

// inNetwork gathers in the agent's network namespace.
func (c *Config) inNetwork(f func(context.Context, *archive.Files) error) func(context.Context, *archive.Files) error {
	return func(ctx context.Context, out *archive.Files) error {
		return c.Agent.inNetwork(func() error { return f(ctx, out) })
	}
}

func (c *Config) doctor(_ context.Context, out *archive.Files) error {
	return c.Agent.inNetwork(func() error {
		facts := doctor.Gather(doctor.Config{PinDir: c.Agent.path(c.PinDir), JournalDir: c.Agent.path(c.JournalDir), Port: c.Port, MarkMask: c.MarkMask})
		return out.JSON("doctor.json", append([]doctor.Check{c.Checked}, doctor.Judge(facts)...))
	})
}

// notHere makes of a file that is not there nothing to gather.
func notHere(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return archive.NotHere("%v", err)
	}
	return err
}

// read reads a file of /proc, /sys or of settings, up to a bound.
func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, fileBytes)
}
