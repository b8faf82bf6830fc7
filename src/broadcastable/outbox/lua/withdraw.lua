-- Give a reserved place up. KEYS: queue, state, turns, held. ARGV: the turn, ms for which others are waited for.
-- Returns 1 when the stream needs a wake-up.
redis.call('ZREM', KEYS[3], ARGV[1])
if not settle(KEYS[1], KEYS[3], KEYS[4], ARGV[2]) then return 0 end
return ask(KEYS[2], now_ms())
