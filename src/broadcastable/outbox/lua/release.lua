-- Give up a lease. KEYS: queue, state. ARGV: lease, ms without claims.
local state = KEYS[2]
if redis.call('HGET', state, 'lease') == ARGV[1] then
  redis.call('HDEL', state, 'lease', 'until', 'woken')
  if tonumber(ARGV[2]) > 0 then redis.call('HSET', state, 'after', text(now_ms() + ARGV[2])) end
end
return 1
