-- Claim the frozen frame, freezing one first. KEYS: queue, state.
-- ARGV: the caller's lease or '', a new lease, ms to hold it, most bytes and most events of a frame.
-- Returns false, or {1 when an earlier claim had it, lease, frame}.
return claim(KEYS[1], KEYS[2], unpack(ARGV))
