// Package certs makes the certificates of a trust domain: its authorities, and the
// X.509-SVIDs that they sign (SPIFFE X509-SVID: one URI, which is the SPIFFE ID; of
// an authority, the trust domain's).
package certs
