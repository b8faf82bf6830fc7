-- Throw a stream's batches away. KEYS: queue, state, turns, held. ARGV: ms for which the state of an idle stream is kept.
-- Returns the number of events lost.
local queue, state = KEYS[1], KEYS[2]
local STAMP = string.rep('\0', 8) -- what is held has not been put at any time yet
if redis.call('EXISTS', queue) == 0 and redis.call('EXISTS', state) == 0 then return 0 end
local held = redis.call('HMGET', state, 'epoch', 'skip')
local lost = -(held[2] or 0)
walk(queue, function(element)
  lost = lost + event_count(element)
  return true
end)
for _, elements in ipairs(redis.call('HVALS', KEYS[4])) do
  for _, element in ipairs(cmsgpack.unpack(elements)) do lost = lost + event_count(STAMP .. element) end
end
redis.call('DEL', queue, state, KEYS[3], KEYS[4])
-- Nobody knows whether the dropped frame's number was used, so the next frame is of another epoch.
redis.call('HSET', state, 'epoch', text(math.max(now_ms(), (held[1] or 0) + 1)), 'seq', 0)
redis.call('PEXPIRE', state, ARGV[1])
return lost
