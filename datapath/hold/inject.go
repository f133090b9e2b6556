package hold

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// ErrDropped is returned by Inject when the packet was not queued: most often
// because the kernel's programs judged it again and dropped it (they have
// counted it then), or because the device's queue is full.
var ErrDropped = errors.New("the packet was dropped on its way back")

// Injector sends held packets back to the devices from which they were taken.
// What it sends is judged again: it cannot make a packet pass.
type Injector struct {
	fd   int
	hdr  [vnetHeaderLen]byte
	turn []byte // control message: the mark of packets for from_workload
	back []byte // the same, of those that came from the L7 proxy

	choices choices
}

// NewInjector opens the packet socket, in the calling thread's network
// namespace. The marks are those of Datapath.Marks. It needs CAP_NET_RAW and
// CAP_NET_ADMIN.
func NewInjector(reinject, turn uint32) (*Injector, error) {
	// Protocol 0: the socket receives nothing. PACKET_QDISC_BYPASS must stay
	// off: it would skip the programs, and with them the second judgement.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open a packet socket (needs CAP_NET_RAW): %w", err)
	}
	in := &Injector{fd: fd, turn: markMessage(turn), back: markMessage(turn ^ reinject)}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		in.Close()
		return nil, fmt.Errorf("set PACKET_VNET_HDR: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(int32(reinject))); err != nil {
		in.Close()
		return nil, fmt.Errorf("set the re-injection mark (needs CAP_NET_ADMIN): %w", err)
	}
	return in, nil
}

// Inject sends the packet back to its device and returns when the kernel has
// judged it. A packet held at to_workload goes there; one held at
// from_workload goes to to_workload too, with the mark that makes the program
// turn it round. Slot, lease and binding must be live before: otherwise the
// program would hold it again. One to a service goes back as it was sent, and
// to whom it was held for. The packet's bytes may be changed. An error
// means that it is lost: the caller counts it, unless it is ErrDropped.
func (in *Injector) Inject(rec Record) error {
	if rec.Service.IsValid() {
		if err := asSent(rec.Packet, rec.GSOSize, rec.Service); err != nil {
			return err
		}
		// Without it the packet is led to whomever the translation chooses now.
		// That is judged again too: it is not worth a packet.
		_ = in.choices.keep(&rec)
	}
	f, err := prepare(rec.Packet, rec.GSOSize, &in.hdr)
	if err != nil {
		return err
	}
	to := &unix.SockaddrLinklayer{Ifindex: int(rec.Ifindex), Protocol: htons(f.etherType), Halen: 6}
	copy(to.Addr[:6], rec.Packet[:6])
	var control []byte
	if rec.Direction == abi.DirEgress {
		control = in.turn
		if rec.Proxied {
			control = in.back
		}
	}
	// Never blocks: a full send buffer loses this packet, not the agent's loop.
	switch _, err := unix.SendmsgBuffers(in.fd, [][]byte{in.hdr[:], rec.Packet}, control, to, unix.MSG_DONTWAIT); {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOBUFS):
		return ErrDropped
	default:
		return fmt.Errorf("send a held packet back to device %d: %w", rec.Ifindex, err)
	}
}

func markMessage(mark uint32) []byte {
	b := make([]byte, unix.CmsgSpace(4))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = unix.SOL_SOCKET, unix.SO_MARK
	h.SetLen(unix.CmsgLen(4))
	binary.NativeEndian.PutUint32(b[unix.CmsgLen(0):], mark)
	return b
}

// Close closes the sockets.
func (in *Injector) Close() error {
	in.choices.close()
	return unix.Close(in.fd)
}

func htons(v uint16) uint16 { return binary.NativeEndian.Uint16([]byte{byte(v >> 8), byte(v)}) }
