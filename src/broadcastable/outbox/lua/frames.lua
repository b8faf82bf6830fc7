-- Frames: what is claimed of a queue, sent, and removed once it is stored.

-- The first `count` events after `skip`: which elements hold them and what their ack removes.
local function measure(queue, skip, count)
  local cut = {elements = 0, done = 0, rest = 0, ends = 0}
  local left = count
  walk(queue, function(element)
    if left == 0 then return false end
    local here = event_count(element) - skip
    cut.elements = cut.elements + 1
    if here <= left then
      cut.done = cut.done + 1
      if ends(element) then cut.ends = cut.ends + 1 end
      left = left - here
      skip = 0
    else
      cut.rest = skip + left
      left = 0
    end
    return true
  end)
  return cut
end

local function freeze(state, count, cut)
  redis.call('HSET', state, 'count', count, 'elements', cut.elements, 'done', cut.done, 'rest', cut.rest,
    'ends', cut.ends)
end

-- Whether the frozen frame has this epoch and number; and how many events it holds.
local function is_current(state, epoch, seq)
  local held = redis.call('HMGET', state, 'epoch', 'seq', 'count')
  return held[1] == epoch and held[2] == seq and held[3] ~= false, tonumber(held[3] or 0)
end

-- The frozen frame as the client reads it, or false when none is.
local function frozen(queue, state)
  local held = redis.call('HMGET', state, 'epoch', 'seq', 'skip', 'count', 'anchor', 'elements')
  if not held[4] then return false end
  return {held[1], held[2], held[3] or '0', held[4], held[5], redis.call('LRANGE', queue, 0, held[6] - 1)}
end

-- The caller's own frame, as it is now.
local function own(state)
  return {'own', redis.call('HMGET', state, 'epoch', 'seq', 'count', 'anchor')}
end

-- Claim the frozen frame, freezing one first. Returns false, or {1 when an earlier claim had it, lease, frame}.
local function claim(queue, state, own_lease, new_lease, lease_for, max_bytes, max_events)
  max_bytes, max_events = tonumber(max_bytes), tonumber(max_events)
  local now = now_ms()
  local held = redis.call('HMGET', state, 'epoch', 'skip', 'count', 'lease', 'until', 'after', 'parked')
  if held[7] or tonumber(held[6] or 0) > now then return false end
  if held[4] and held[4] ~= own_lease and tonumber(held[5]) > now then return false end
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
  local lease = held[4] == own_lease and held[4] or new_lease
  redis.call('HSET', state, 'lease', lease, 'until', text(now + lease_for), 'woken', text(now))
  redis.call('HDEL', state, 'after')
  return {begun, lease, frozen(queue, state)}
end

-- Remove the frozen frame's events, or the first of them. Returns 1 when this call did it.
local function ack(queue, state, epoch, seq, events, has_offset, offset, kept_for)
  local current, count = is_current(state, epoch, seq)
  if not current then return 0 end
  events = math.min(count, tonumber(events))
  local held = redis.call('HMGET', state, 'done', 'rest', 'ends', 'skip')
  local cut = {done = held[1], rest = held[2], ends = held[3]}
  if events < count then cut = measure(queue, tonumber(held[4] or 0), events) end
  redis.call('LTRIM', queue, cut.done, -1)
  redis.call('HDEL', state, 'count', 'elements', 'done', 'rest', 'ends', 'parked')
  redis.call('HSET', state, 'skip', cut.rest)
  redis.call('HINCRBY', state, 'seq', 1)
  redis.call('HINCRBY', state, 'batches', -cut.ends)
  redis.call('HINCRBY', state, 'events', -events)
  if has_offset == '1' then redis.call('HSET', state, 'anchor', offset) end
  if redis.call('EXISTS', queue) == 0 then redis.call('PEXPIRE', state, kept_for) end
  return 1
end

-- After a claim that found nothing. Returns 1 when there is something to claim after all.
local function finish(queue, state, own_lease)
  local now = now_ms()
  local held = redis.call('HMGET', state, 'lease', 'until', 'after', 'parked')
  if held[1] and held[1] ~= own_lease and tonumber(held[2]) > now then return 0 end
  redis.call('HDEL', state, 'lease', 'until')
  if redis.call('EXISTS', queue) == 1 and not held[4] and tonumber(held[3] or 0) <= now then return 1 end
  redis.call('HDEL', state, 'woken')
  return 0
end
