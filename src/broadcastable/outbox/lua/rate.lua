-- What was acked in the last whole seconds. KEYS: a ring of seconds. ARGV: how many seconds, places in the ring.
-- Returns {frames, events}.
local now = redis.call('TIME')[1]
local frames, events = 0, 0
for second = now - ARGV[1], now - 1 do
  local place = text(second % ARGV[2])
  local held = redis.call('HMGET', KEYS[1], place .. ':at', place .. ':frames', place .. ':events')
  if held[1] == text(second) then
    frames = frames + held[2]
    events = events + held[3]
  end
end
return {text(frames), text(events)}
