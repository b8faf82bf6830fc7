-- Keep the first events of the frozen frame only. KEYS: queue, state. ARGV: epoch, seq, events.
local queue, state = KEYS[1], KEYS[2]
local current, count = is_current(state, ARGV[1], ARGV[2])
if not current then return {'other', frozen(queue, state)} end
local events = math.max(1, math.min(count, tonumber(ARGV[3])))
freeze(state, events, measure(queue, tonumber(redis.call('HGET', state, 'skip') or 0), events))
return own(state)
