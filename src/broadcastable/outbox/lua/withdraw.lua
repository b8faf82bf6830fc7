-- Give a reserved place up. KEYS: queue, state, turns, held. ARGV: the turn, ms for which others are waited for.
-- Returns 1 when the stream needs a wake-up.
-- Not the turn of what is held: a reservation that came late may be withdrawn after the push.
if redis.call('HEXISTS', KEYS[4], ARGV[1]) == 0 then redis.call('ZREM', KEYS[3], ARGV[1]) end
if not settle(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[2]) then return 0 end
return ask(KEYS[2], now_ms())
