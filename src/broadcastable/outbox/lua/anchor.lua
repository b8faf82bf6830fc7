-- Remember an offset from before the frozen frame. KEYS: queue, state.
-- ARGV: epoch, seq, 1 when the caller knows an anchor, that anchor, the new one.
local queue, state = KEYS[1], KEYS[2]
local known = ARGV[3] == '1' and ARGV[4]
if not is_current(state, ARGV[1], ARGV[2]) or redis.call('HGET', state, 'anchor') ~= known then
  return {'other', frozen(queue, state)}
end
redis.call('HSET', state, 'anchor', ARGV[5])
return own(state)
