package journal

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// The file: a frame with the header, then one frame per record.
//
//	 0        4          8              12
//	+--------+----------+--------------+------------- - -
//	| length | crc of   | crc of the   | payload (JSON),
//	| (u32)  | payload  | first 8 byte | length bytes
//	+--------+----------+--------------+------------- - -
//
// The second checksum tells a last frame that was cut off, which a crash can
// leave, from a length that is damaged, which would hide all that follows it.
const (
	frameHead  = 12
	maxPayload = 64 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is the first frame.
type header struct {
	Format  int
	Boot    identity.BootID
	Created lease.Time // BOOTTIME at which the file was begun
	// Origin is what was known then of the process before. It still counts
	// while no record follows: the owner writes its start-up wait first.
	Origin lease.JournalState
}

const format = 1

// appendFrame appends the frame of a value.
func appendFrame(b []byte, v any) ([]byte, error) {
	payload, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	if len(payload) > maxPayload {
		return nil, fmt.Errorf("a record of %d bytes: the limit is %d", len(payload), maxPayload)
	}
	at := len(b)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(payload, castagnoli))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b[at:], castagnoli))
	return append(b, payload...), nil
}

// errTorn: the data ends within a frame.
var errTorn = errors.New("cut off within a record")

// nextFrame returns the payload of the first frame and what follows it. io.EOF:
// there is none. errTorn: it is cut off. Other errors: it is damaged.
func nextFrame(b []byte) (payload, rest []byte, err error) {
	switch {
	case len(b) == 0:
		return nil, nil, io.EOF
	case len(b) < frameHead:
		return nil, nil, errTorn
	}
	n := binary.BigEndian.Uint32(b)
	if crc32.Checksum(b[:8], castagnoli) != binary.BigEndian.Uint32(b[8:]) || n > maxPayload {
		return nil, nil, errors.New("the head of a record is damaged")
	}
	if uint64(len(b)) < frameHead+uint64(n) {
		return nil, nil, errTorn
	}
	payload, rest = b[frameHead:frameHead+n], b[frameHead+n:]
	if crc32.Checksum(payload, castagnoli) != binary.BigEndian.Uint32(b[4:]) {
		return nil, nil, errors.New("a record is damaged")
	}
	return payload, rest, nil
}

// decode reads a payload that must hold nothing but the fields of v.
func decode(payload []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(payload))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if d.More() {
		return errors.New("more than one value in a record")
	}
	return nil
}

// parse reads a whole file. good is how many of its bytes are whole frames; if
// it is less than all, the rest is a frame that was cut off.
func parse(data []byte) (h header, records []lease.Record, good int, err error) {
	payload, rest, err := nextFrame(data)
	if err != nil {
		// The header is written before the file gets its name, so that a
		// crash cannot cut it.
		return h, nil, 0, fmt.Errorf("no header: %w", err)
	}
	if err := decode(payload, &h); err != nil {
		return h, nil, 0, fmt.Errorf("header: %w", err)
	}
	if h.Format != format {
		return h, nil, 0, fmt.Errorf("format %d, this version reads %d", h.Format, format)
	}
	if h.Origin < lease.JournalPresent || h.Origin > lease.JournalMissing {
		return h, nil, 0, fmt.Errorf("header: unknown origin %d", h.Origin)
	}
	for {
		at := len(data) - len(rest)
		payload, rest, err = nextFrame(rest)
		switch {
		case err == io.EOF || err == errTorn:
			return h, records, at, nil
		case err != nil:
			return h, nil, 0, fmt.Errorf("at byte %d: %w", at, err)
		}
		var r lease.Record
		if err := decode(payload, &r); err != nil {
			return h, nil, 0, fmt.Errorf("at byte %d: %w", at, err)
		}
		if err := checkRecord(r); err != nil {
			return h, nil, 0, fmt.Errorf("at byte %d: %w", at, err)
		}
		records = append(records, r)
	}
}

// checkRecord refuses what a later reader could not act on.
func checkRecord(r lease.Record) error {
	switch r.Kind {
	case lease.RecordWait:
		return nil // speaks of no IP
	case lease.RecordGrant, lease.RecordGrantEnded, lease.RecordBound, lease.RecordEnded:
	default:
		return fmt.Errorf("a record of the unknown kind %d", r.Kind)
	}
	if !r.IP.IsValid() || r.IP.Is4In6() {
		return fmt.Errorf("a record of the IP %q", r.IP)
	}
	return nil
}
