package datapath_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// nft speaks to the kernel's nf_tables in the thread's network namespace: as
// much of it as a node's address translation takes.
type nft struct {
	l     *lab
	batch []byte
	seq   uint32
}

// Of linux/netfilter/nf_tables.h.
const (
	nftNewTable = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWTABLE
	nftDelTable = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELTABLE
	nftNewChain = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWCHAIN
	nftNewRule  = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWRULE
	nftNewObj   = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWOBJ

	hookPrerouting, hookPostrouting = 0, 4
)

func attr(kind uint16, value []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), value...)
	return append(b, make([]byte, -len(b)&3)...)
}

func nested(kind uint16, attrs ...[]byte) []byte {
	var all []byte
	for _, a := range attrs {
		all = append(all, a...)
	}
	return attr(kind|unix.NLA_F_NESTED, all)
}

func attr32(kind uint16, v uint32) []byte { return attr(kind, binary.BigEndian.AppendUint32(nil, v)) }

func attrText(kind uint16, s string) []byte { return attr(kind, append([]byte(s), 0)) }

func expr(name string, attrs ...[]byte) []byte {
	return nested(1, attrText(1, name), nested(2, attrs...))
}

func (n *nft) message(kind, flags uint16, family uint8, resource uint16, attrs ...[]byte) {
	n.seq++
	size := 16 + 4
	for _, a := range attrs {
		size += len(a)
	}
	b := binary.NativeEndian.AppendUint32(n.batch, uint32(size))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags|unix.NLM_F_REQUEST)
	b = binary.NativeEndian.AppendUint32(b, n.seq)
	b = append(b, 0, 0, 0, 0, family, 0, byte(resource>>8), byte(resource))
	for _, a := range attrs {
		b = append(b, a...)
	}
	n.batch = b
}

// chain makes a table of one NAT chain with one rule.
func (n *nft) chain(is4 bool, name string, hook uint32, exprs ...[]byte) {
	family := uint8(unix.NFPROTO_IPV4)
	if !is4 {
		family = unix.NFPROTO_IPV6
	}
	const create = unix.NLM_F_CREATE | unix.NLM_F_ACK
	n.message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	n.message(nftNewTable, create, family, 0, attrText(unix.NFTA_TABLE_NAME, name))
	n.message(nftNewChain, create, family, 0, attrText(unix.NFTA_CHAIN_TABLE, name), attrText(unix.NFTA_CHAIN_NAME, name),
		nested(unix.NFTA_CHAIN_HOOK, attr32(unix.NFTA_HOOK_HOOKNUM, hook), attr32(unix.NFTA_HOOK_PRIORITY, 0)), attrText(unix.NFTA_CHAIN_TYPE, "nat"))
	n.message(nftNewRule, create|unix.NLM_F_APPEND, family, 0, attrText(unix.NFTA_RULE_TABLE, name), attrText(unix.NFTA_RULE_CHAIN, name),
		nested(unix.NFTA_RULE_EXPRESSIONS, exprs...))
	n.message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	n.l.must(n.send(3))
}

// unforward ends what forward began, if it did.
func (l *lab) unforward(is4 bool) {
	l.t.Helper()
	family := uint8(unix.NFPROTO_IPV4)
	if !is4 {
		family = unix.NFPROTO_IPV6
	}
	n := &nft{l: l}
	n.message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	n.message(nftDelTable, unix.NLM_F_ACK, family, 0, attrText(unix.NFTA_TABLE_NAME, "forward"))
	n.message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	if err := n.send(1); err != nil && !errors.Is(err, unix.ENOENT) {
		l.t.Fatal(err)
	}
}

// send sends the batch and waits for the acknowledgements.
func (n *nft) send(acks int) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		return err
	}
	if err := unix.Sendto(fd, n.batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	n.batch = nil
	buf := make([]byte, 1<<16)
	for acks > 0 {
		size, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return fmt.Errorf("nf_tables: %w", err)
		}
		answers, err := syscall.ParseNetlinkMessage(buf[:size])
		if err != nil {
			return err
		}
		for _, a := range answers {
			if a.Header.Type != unix.NLMSG_ERROR || len(a.Data) < 4 {
				return errors.New("nf_tables: an answer that is none")
			}
			if e := int32(binary.NativeEndian.Uint32(a.Data)); e != 0 {
				return fmt.Errorf("nf_tables: message %d: %w", a.Header.Seq, unix.Errno(-e))
			}
			acks--
		}
	}
	return nil
}

// masquerade gives what the node forwards the node's own address as source.
func (l *lab) masquerade(is4 bool) {
	l.t.Helper()
	(&nft{l: l}).chain(is4, "masquerade", hookPostrouting, expr("masq"))
}

// forward leads what is sent to one of the node's addresses and a port to
// somebody else, as a NodePort does.
func (l *lab) forward(from, to netip.AddrPort) {
	l.t.Helper()
	be16 := func(port uint16) []byte { return binary.BigEndian.AppendUint16(nil, port) }
	l.dnat(from.Addr(), to.Addr(), [][]byte{nftLoad(2, 2, 2), nftEqual(be16(from.Port()))}, nftSet(2, be16(to.Port())),
		attr32(unix.NFTA_NAT_REG_PROTO_MIN, 2))
}

// forwardAll leads all that is sent to an address to somebody else.
func (l *lab) forwardAll(from, to netip.Addr) {
	l.t.Helper()
	l.dnat(from, to, nil, nil, nil)
}

func nftLoad(base, offset, size uint32) []byte {
	return expr("payload", attr32(unix.NFTA_PAYLOAD_DREG, 1), attr32(unix.NFTA_PAYLOAD_BASE, base),
		attr32(unix.NFTA_PAYLOAD_OFFSET, offset), attr32(unix.NFTA_PAYLOAD_LEN, size))
}

func nftEqual(v []byte) []byte {
	return expr("cmp", attr32(unix.NFTA_CMP_SREG, 1), attr32(unix.NFTA_CMP_OP, unix.NFT_CMP_EQ),
		nested(unix.NFTA_CMP_DATA, attr(unix.NFTA_DATA_VALUE, v)))
}

func nftSet(reg uint32, v []byte) []byte {
	return expr("immediate", attr32(unix.NFTA_IMMEDIATE_DREG, reg), nested(unix.NFTA_IMMEDIATE_DATA, attr(unix.NFTA_DATA_VALUE, v)))
}

func (l *lab) dnat(from, to netip.Addr, match [][]byte, port, portAttr []byte) {
	l.t.Helper()
	const network = 1
	offset, size, family := uint32(16), uint32(4), uint32(unix.NFPROTO_IPV4)
	if from.Is6() {
		offset, size, family = 24, 16, unix.NFPROTO_IPV6
	}
	exprs := append([][]byte{nftLoad(network, offset, size), nftEqual(from.AsSlice())}, match...)
	exprs = append(exprs, nftSet(1, to.AsSlice()), port,
		expr("nat", attr32(unix.NFTA_NAT_TYPE, unix.NFT_NAT_DNAT), attr32(unix.NFTA_NAT_FAMILY, family), attr32(unix.NFTA_NAT_REG_ADDR_MIN, 1), portAttr))
	(&nft{l: l}).chain(from.Is4(), "forward", hookPrerouting, exprs...)
}

// helper has the node's connection tracking look into what goes to a port, for
// connections that belong to that one.
func (l *lab) helper(name string, port uint16) {
	l.t.Helper()
	const create, transport, objectHelper = unix.NLM_F_CREATE | unix.NLM_F_ACK, 2, 3
	const family = uint8(unix.NFPROTO_IPV4)
	n := &nft{l: l}
	n.message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	n.message(nftNewTable, create, family, 0, attrText(unix.NFTA_TABLE_NAME, "helper"))
	n.message(nftNewObj, create, family, 0, attrText(unix.NFTA_OBJ_TABLE, "helper"), attrText(unix.NFTA_OBJ_NAME, name), attr32(unix.NFTA_OBJ_TYPE, objectHelper),
		nested(unix.NFTA_OBJ_DATA, attrText(1, name), attr(3, []byte{unix.IPPROTO_TCP}))) // NFTA_CT_HELPER_NAME, _L4PROTO
	beforeNAT := int32(-150)
	n.message(nftNewChain, create, family, 0, attrText(unix.NFTA_CHAIN_TABLE, "helper"), attrText(unix.NFTA_CHAIN_NAME, "helper"),
		nested(unix.NFTA_CHAIN_HOOK, attr32(unix.NFTA_HOOK_HOOKNUM, hookPrerouting), attr32(unix.NFTA_HOOK_PRIORITY, uint32(beforeNAT))), attrText(unix.NFTA_CHAIN_TYPE, "filter"))
	n.message(nftNewRule, create|unix.NLM_F_APPEND, family, 0, attrText(unix.NFTA_RULE_TABLE, "helper"), attrText(unix.NFTA_RULE_CHAIN, "helper"),
		nested(unix.NFTA_RULE_EXPRESSIONS, nftLoad(transport, 2, 2), nftEqual(binary.BigEndian.AppendUint16(nil, port)),
			expr("objref", attr32(1, objectHelper), attrText(2, name)))) // NFTA_OBJREF_IMM_TYPE, _NAME
	n.message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	l.must(n.send(4))
}
