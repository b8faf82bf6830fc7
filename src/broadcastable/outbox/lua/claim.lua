-- Claim the frozen frame, freezing one first. KEYS: queue, state.
-- ARGV: the caller's lease or '', a new lease, ms to hold it, most bytes and most events of a frame.
-- Returns false, or {1 when an earlier claim had it, lease, frame}.
local queue, state = KEYS[1], KEYS[2]
local max_bytes, max_events = tonumber(ARGV[4]), tonumber(ARGV[5])
local now = now_ms()
local held = redis.call('HMGET', state, 'epoch', 'skip', 'count', 'lease', 'until', 'after', 'parked')
if held[7] or tonumber(held[6] or 0) > now then return false end
if held[4] and held[4] ~= ARGV[1] and tonumber(held[5]) > now then return false end
if redis.call('EXISTS', queue) == 0 then return false end

if not held[1] then
  redis.call('HSET', state, 'epoch', text(now), 'seq', 0)
end
local begun = held[3] and 1 or 0
if begun == 0 then
  -- Whole batches up to the limits; a batch may be several elements. Only the first one is cut where it must be.
  local skip, count, size, head = tonumber(held[2] or 0), 0, 1, true
  local cut = {elements = 0, done = 0, rest = 0, ends = 0}
  local whole_count, whole_elements = 0, 0
  walk(queue, function(element)
    local taken, taken_size = 0, 0
    for event = skip + 1, event_count(element) do
      local length = struct.unpack('>I4', element, LENGTHS_AT + 4 * (event - 1))
      local before = count + taken
      if before > 0 and (before == max_events or size + taken_size + length + 1 > max_bytes) then
        if not head then
          count, cut.elements, cut.done = whole_count, whole_elements, whole_elements
        elseif taken > 0 then
          count = before
          cut.elements = cut.elements + 1
          cut.rest = skip + taken
        end
        return false
      end
      taken = taken + 1
      taken_size = taken_size + length + 1
    end
    count = count + taken
    size = size + taken_size
    cut.elements = cut.elements + 1
    cut.done = cut.done + 1
    skip = 0
    if ends(element) then
      cut.ends = cut.ends + 1
      whole_count, whole_elements = count, cut.elements
      head = false
    end
    return true
  end)
  freeze(state, count, cut)
end
local lease = held[4] == ARGV[1] and held[4] or ARGV[2]
redis.call('HSET', state, 'lease', lease, 'until', text(now + ARGV[3]), 'woken', text(now))
redis.call('HDEL', state, 'after')
return {begun, lease, frozen(queue, state)}
