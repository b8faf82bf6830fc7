-- Remove the frozen frame's events, or the first of them. KEYS: queue, state.
-- ARGV: epoch, seq, events, 1 when there is an offset, the offset, ms for which the state of an idle stream is kept.
-- Returns 1 when this call did it.
return ack(KEYS[1], KEYS[2], unpack(ARGV))
