-- Give the frozen frame a new epoch. KEYS: queue, state. ARGV: epoch, seq, the epoch it must be above.
local queue, state = KEYS[1], KEYS[2]
if not is_current(state, ARGV[1], ARGV[2]) then return {'other', frozen(queue, state)} end
redis.call('HSET', state, 'epoch', text(math.max(now_ms(), ARGV[1] + 1, ARGV[3] + 1)), 'seq', 0)
return own(state)
