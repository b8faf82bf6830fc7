-- Set a stream aside. KEYS: queue, state. ARGV: epoch, seq, error.
local state = KEYS[2]
if is_current(state, ARGV[1], ARGV[2]) then
  redis.call('HDEL', state, 'lease', 'until', 'woken')
  redis.call('HSET', state, 'parked', ARGV[3])
end
return 1
