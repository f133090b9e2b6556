package proxy

func (p *pair) serveTLS(d Decision) { p.abort("later") }
