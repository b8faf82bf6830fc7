-- Reserve a transaction's place, before it commits. KEYS: state, turns, held.
-- ARGV: the turn, ms for which it is waited for.
-- Returns 1 when the stream sleeps, so that what comes next will need a wake-up.
local state, turns, held = KEYS[1], KEYS[2], KEYS[3]
redis.call('ZADD', turns, 'NX', place(turns), ARGV[1])
if redis.call('EXISTS', held) == 0 then redis.call('PEXPIRE', turns, 10 * ARGV[2]) end
return sleeps(state, now_ms()) and 1 or 0
