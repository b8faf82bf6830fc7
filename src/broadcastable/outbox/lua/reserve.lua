-- Reserve a transaction's place, before it commits. KEYS: turns, held.
-- ARGV: the turn, ms for which it is waited for.
redis.call('ZADD', KEYS[1], 'NX', place(KEYS[1]), ARGV[1])
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('PEXPIRE', KEYS[1], 10 * ARGV[2]) end
return 1
